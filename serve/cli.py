"""`packhorse serve`: flags become settings, errors become exit codes. Nothing else happens here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from serve.errors import StartupError
from serve.settings import load

app = typer.Typer(
    help="Serve a model folder over OpenAI-compatible HTTP with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it swallows [default: ...] and joins example lines
)


@app.callback()
def packhorse() -> None:
    """Serve a model folder over OpenAI-compatible HTTP with vLLM."""


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder (from `quantize`, or any Hugging Face checkpoint), or a hub name."
        ),
    ] = "",
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on; 0 lets the system choose. [default: 8000]"),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name that clients send as `model`. [default: the folder's name]"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any setting, nested as in docs/settings.md; flags win over it."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of prompt and answer together. [default: the model's own]"),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most requests in one batch. [default: vLLM's]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, bfloat16, float16 or float32. [default: auto]")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, fp8, fp8_e4m3 or fp8_e5m2; fp8 halves the KV cache. [default: auto]"
        ),
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            help="Size of the KV-cache pool. [default: 1 GiB on CPU, vLLM's choice on CUDA]"
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls: hermes, llama3_json, mistral, ... "
            "[default: none; tools are refused]"
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model marks its reasoning: qwen3, deepseek_r1, ... [default: none]"
        ),
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(help="After SIGTERM, how long running requests may take. [default: 30]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm, or echo: an engine without a model, for tests. [default: vllm]"),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [default: info]")
    ] = None,
) -> None:
    """Serve MODEL until SIGTERM or Ctrl-C; then finish what is running and exit 0.

    \b
    packhorse serve out/demo-int8
    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"model": "demo-int8", "messages": [{"role": "user", "content": "Hello!"}]}'

    Every setting can also come from the environment (PACKHORSE_HTTP__PORT=8001) or a YAML file
    (--config). /health/live, /health/ready and /metrics are served beside /v1. Exit code 2: it
    could not start as configured.
    """
    flags: dict[str, Any] = {
        "model": model or None,
        "log_level": log_level,
        "http": {"host": host, "port": port},
        "service": {"served_model_name": served_model_name, "drain_timeout_s": drain_timeout_s},
        "engine": {
            "kind": engine,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_dtype": kv_cache_dtype,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "tool_call_parser": tool_call_parser,
            "reasoning_parser": reasoning_parser,
        },
    }
    try:
        settings = load(config, _typed(flags))
        if not settings.model and settings.engine.kind == "vllm":
            raise StartupError("Which model? Give its folder: packhorse serve FOLDER.")
        # Imported late, so that --help and mistakes answer at once.
        from serve.main import run

        run(settings)
    except StartupError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error


def _typed(flags: dict[str, Any]) -> dict[str, Any]:
    """Only what was typed, so that absent flags hide neither environment nor file."""
    kept = {
        name: _typed(value) if isinstance(value, dict) else value for name, value in flags.items()
    }
    return {name: value for name, value in kept.items() if value is not None and value != {}}
