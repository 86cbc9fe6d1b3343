"""`packhorse serve` and `packhorse batch`: flags become settings, errors become exit codes.
`packhorse keys new` prints a key. Nothing else happens here.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from packhorse.serve.access.keys import entry_of, new_key
from packhorse.serve.errors import StartupError
from packhorse.serve.settings import load

app = typer.Typer(
    help="Serve a model folder over OpenAI-compatible HTTP with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it swallows [default: ...] and joins example lines
)


keys_app = typer.Typer(
    help="API keys.", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(keys_app, name="keys")


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
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with the API keys, see `packhorse keys new`. [default: none; all may infer]"
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a folder for each LoRA adapter, watched for changes. [default: none]"
        ),
    ] = None,
    batches: Annotated[
        Path | None,
        typer.Option(
            help="Folder for uploaded files and batches. [default: none; there are no batches]"
        ),
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option(
            help="File that says which adapter answers requests for the model `auto`. "
            "[default: learned from the adapters' examples alone]"
        ),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Serve gRPC too, on this port; 0 lets the system choose. [default: no]"),
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(help="After SIGTERM, how long running requests may take. [default: 30]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm; for tests echo, without a model, or vllm-echo. [default: vllm]"),
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
        "rpc": {"port": grpc_port},
        "auth": {"keys_file": api_keys},
        "adapters": {"folder": adapters},
        "batches": {"folder": batches},
        "routing": {"file": routes},
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
        if not settings.model and settings.engine.kind != "echo":
            raise StartupError("Which model? Give its folder: packhorse serve FOLDER.")
        # Imported late, so that --help and mistakes answer at once.
        from packhorse.serve.server import run

        run(settings)
    except StartupError as error:
        raise _exit(error) from error


@app.command()
def batch(
    file: Annotated[
        Path, typer.Argument(help="JSONL: custom_id, method, url and body in each line.")
    ],
    model: Annotated[str, typer.Option(help="Model folder, as for `serve`, or a hub name.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="Where the answers go. [default: beside FILE, NAME.output.jsonl]"),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name that the lines have as `model`. [default: the folder's name]"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any setting, nested as in docs/settings.md; flags win over it."
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder for each LoRA adapter. [default: none]"),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Lines in the engine at once. [default: its max_num_seqs]"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A running server that is to do it, instead of this command itself."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="A key, if that server has keys."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm; for tests echo, without a model. [default: vllm]"),
    ] = None,
) -> None:
    """Answer every line of FILE with MODEL, without a server; or, with --url, by a server. Cut
    short, it goes on where it was when it is run again.

    \b
    packhorse batch questions.jsonl --model out/demo-int8
    packhorse batch questions.jsonl --url http://127.0.0.1:8000

    Answers go to --output, and errors of lines beside it (NAME.errors.jsonl), in OpenAI's format.
    Exit code 0: all lines are answered; 1: some are errors; 2: it could not start as configured;
    130: stopped, run it again.
    """
    flags: dict[str, Any] = {
        "model": model or None,
        "adapters": {"folder": adapters},
        "service": {"served_model_name": served_model_name},
        "engine": {"kind": engine},
    }
    if output is None:
        output = file.with_name(f"{file.stem}.output.jsonl")
    errors = output.with_name(
        output.name.removesuffix(".jsonl").removesuffix(".output") + ".errors.jsonl"
    )
    try:
        if url is not None:
            code = _remotely(url, api_key, file, output, errors, alone=_typed(flags) or config)
        else:
            settings = load(config, _typed(flags))
            if not settings.model and settings.engine.kind != "echo":
                raise StartupError(
                    "Which model? Give its folder: packhorse batch FILE --model FOLDER; or give "
                    "the --url of a server."
                )
            from packhorse.serve.batch_command import Files, run_file

            code = run_file(settings, Files(file, output, errors), concurrency)
    except StartupError as error:
        raise _exit(error) from error
    if code:
        raise typer.Exit(code)


def _remotely(
    url: str, api_key: str | None, file: Path, output: Path, errors: Path, *, alone: object
) -> int:
    """`packhorse batch --url`; `alone` are options that have no effect with it."""
    if alone:
        raise StartupError("With --url the server has the model and its settings; leave out both.")
    from packhorse.serve.batch_remote import Server, run_file

    return run_file(Server(url, _header_key(api_key)), file, output, errors)


def _header_key(api_key: str | None) -> str | None:
    """A key as a header can hold it. Raises StartupError, which does not show it."""
    api_key = (api_key or "").strip()  # a file's end of line is no part of it
    if api_key and not (api_key.isascii() and api_key.isprintable()):  # urllib would show it
        raise StartupError("The API key has characters that no header can hold.")
    return api_key or None


@app.command()
def route(
    text: Annotated[str, typer.Argument(help="What a user would write.")],
    url: Annotated[
        str, typer.Option(help="The server. [default: http://127.0.0.1:8000]")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="A key, if the server has keys.")
    ] = None,
) -> None:
    """Ask a running server which adapter TEXT would go to, and why. Prints JSON; nothing is
    generated.

    \b
    packhorse route "What is the dose of Zentrol?"
    """
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    headers = {"content-type": "application/json"}
    try:
        if key := _header_key(api_key):
            headers["authorization"] = f"Bearer {key}"
    except StartupError as error:
        raise _exit(error) from error
    try:
        asked = urllib.request.Request(
            url.rstrip("/") + "/v1/route", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            decision = json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:1000]
        raise _exit(StartupError(f"{url} answered {error.code}: {said}")) from error
    except (OSError, ValueError) as error:
        raise _exit(StartupError(f"{url} cannot be asked: {error}")) from error
    typer.echo(json.dumps(decision, indent=2, ensure_ascii=False))


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Option(help="Who will use it; shown in logs.")],
    tenant: Annotated[
        str | None,
        typer.Option(help="Keys of one tenant share cached answers. [default: the name]"),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, admin or metrics; may be repeated. [default: inference]"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter it may use; may be repeated. [default: all]"),
    ] = None,
    base: Annotated[
        bool, typer.Option(help="Whether it may use the base model itself, beside adapters.")
    ] = True,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Most calls at once. [default: no limit]")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(help="Most tokens, prompts and answers together. [default: no limit]"),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Most calls. [default: no limit]")
    ] = None,
) -> None:
    """Make an API key. It is shown once, on stderr, and is stored nowhere; the entry for the keys
    file, with its hash, goes to stdout.

    \b
    packhorse keys new --name batch --scope inference >> keys.yaml
    packhorse serve out/demo-int8 --api-keys keys.yaml
    """
    quotas = {
        "max_concurrent": max_concurrent,
        "tokens_per_minute": tokens_per_minute,
        "requests_per_minute": requests_per_minute,
    }
    fields: dict[str, Any] = {
        "name": name,
        "tenant": tenant,
        "scopes": scope or ["inference"],
        "adapters": adapter,
        "base": None if base else False,
        "quotas": quotas,
    }
    key = new_key()
    try:
        entry = entry_of(key, **_typed(fields))
    except StartupError as error:
        raise _exit(error) from error
    typer.echo(f"The key, shown only now: {key}", err=True)
    typer.echo(entry, nl=False)


def _exit(error: StartupError) -> typer.Exit:
    """Tell the error; what to raise."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
    return typer.Exit(2)


def _typed(flags: dict[str, Any]) -> dict[str, Any]:
    """Only what was typed, so that absent flags hide neither environment nor file."""
    kept = {
        name: _typed(value) if isinstance(value, dict) else value for name, value in flags.items()
    }
    return {name: value for name, value in kept.items() if value is not None and value != {}}
