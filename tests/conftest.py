"""Shared makers: small random checkpoints, and servers in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forkserver import Forked, ForkServer

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEMO = ROOT / "demo"
FORK_SERVER = ForkServer()
Process = subprocess.Popen[bytes] | Forked
running_servers: list[Server] = []


@dataclass
class Server:
    """A running `packhorse serve`."""

    process: Process
    url: str
    model: str
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self, *, timeout_s: float = 60) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def running_server(
    folder: Path,
    *arguments: str,
    start_timeout_s: float = 240,
    environment: dict[str, str] | None = None,
    cache: bool = False,
    fresh: bool = False,
) -> Iterator[Server]:
    """`packhorse serve ARGUMENTS` on a port that the system chooses, ready; log in `folder`.

    Without a result cache unless asked for: most tests are about what is behind it, and ask the
    same more than once. With vLLM it is a fork of a process that has imported that, see
    forkserver.py, unless `fresh`.
    """
    settings = {} if cache else {"PACKHORSE_CACHE__ENABLED": "false"}
    log_path = folder / f"serve-{time.monotonic_ns()}.log"
    command = [str(BIN / "packhorse"), "serve", *arguments, "--port", "0"]
    with log_path.open("wb") as log:
        process = start(
            command,
            folder,
            log.fileno(),
            {**os.environ, **settings, **(environment or {})},
            fresh=fresh or "echo" in arguments,
        )
    server = None
    try:
        server = Server(process, *_wait_until_serving(process, log_path, start_timeout_s), log_path)
        running_servers.append(server)
        yield server
    finally:
        if server is not None:
            running_servers.remove(server)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(
    command: list[str], folder: Path, log: int, environment: dict[str, str], *, fresh: bool
) -> Process:
    """Start a command in a process group of its own, as a shell does."""
    if not fresh and FORK_SERVER.fits(environment):
        return FORK_SERVER.run(command, folder, log, environment)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    from tests.reporting import Reporting

    config.pluginmanager.register(Reporting())


def pytest_sessionfinish() -> None:
    FORK_SERVER.close()


def _wait_until_serving(process: Process, log_path: Path, timeout_s: float) -> tuple[str, str]:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        text = log_path.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"Serving (\S+) at (http://\S+)/v1", text):
            return found[2], found[1]
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{text[-4000:]}")
        time.sleep(0.1)
    raise AssertionError(
        f"the server did not start in {timeout_s} s:\n{log_path.read_text()[-4000:]}"
    )


@pytest.fixture(scope="session")
def echo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One echo server for the session."""
    with running_server(tmp_path_factory.mktemp("echo"), "--engine", "echo") as server:
        yield server


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `quantize ...` or `packhorse ...` in an empty folder, as a user does."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        # A wide terminal, so that messages are not wrapped in the middle of what a test looks for.
        environment = {**os.environ, "COLUMNS": "1000"}
        command = [str(BIN / name), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Llama of three blocks in two shards."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).bfloat16()

    hidden, inner, kv, vocab = 128, 192, 64, 2048
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    shards[0] = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": random(hidden),
    }
    for index in range(3):
        shapes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        for name, shape in shapes.items():
            shards[index % 2][f"model.layers.{index}.{name}.weight"] = random(*shape)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder
