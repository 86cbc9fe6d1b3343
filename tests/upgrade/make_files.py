"""Makes files_eccf297/: what version eccf297 of Packhorse leaves on a disk and in a Redis.

The files were made once, by these commands, and are not made again (a newer version would make
others). RUN names the folder of this script; PYTHON has the dependencies of eccf297:

    git clone REPOSITORY old && cd old && git checkout eccf297
    OMP_NUM_THREADS=1 PYTHON RUN/make_files.py RUN/files_eccf297

The working directory must be that checkout: its `serve` and `quantize` are run, and its
tests/stores.py starts the redis-server. With other versions of torch or transformers, or on another
CPU, the bytes of quantized weights differ in their last bits.

model/                a random Llama of two blocks: base model of the adapters, source of `quantize`
calibration.jsonl     its calibration text
packhorse.yaml        every documented setting, none with its default
keys.yaml             three API keys: `key-NAME-for-tests` is the key NAME
adapters/             two PEFT folders as an operator has them
store/                `adapters.store` of a server that was given them, and before that an older
                      version of `blue`; `.routes` is the learned stage of its routing
store.json            what GET /admin/adapters and POST /v1/route said then
redis.json            keys and values (base64) that the server wrote to Redis, its flush epochs, and
                      the requests with their answers: each was asked before and after four flushes
quantize/NAME.partial workspace of a `quantize model` that SIGKILL ended after the first block
quantize/NAME.json    its command line, and the sha256 of each tensor of a run that nothing ended
options.json          the options of each command

Left out are the lock files, which hold a process id or nothing, and the folder `checkpoint` of each
workspace, which is empty and which git does not keep. No file holds a path of the machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

COMMIT = "eccf297"
OLD = Path.cwd()
SECRET = "a-secret-of-the-upgrade-tests"
HIDDEN, INNER, KEYS, VOCABULARY, BLOCKS = 32, 64, 32, 128, 2

# Every documented setting. Some of these servers cannot run like this (a keys file and a key, files
# that are nowhere); the settings are accepted.
SETTINGS: dict[str, Any] = {
    "model": "out/demo-int8",
    "log_level": "debug",
    "log_format": "json",
    "log_prompts": True,
    "http": {
        "host": "127.0.0.2", "port": 8011, "max_body_bytes": 1048576,
        "stalled_client_timeout_s": 45.5, "keep_alive_s": 90, "admin_port": 8012,
        "admin_host": "127.0.0.3", "tls_certificate": "tls/http.pem", "tls_key": "tls/http.key",
        "cors_origins": ["https://chat.example.org", "http://localhost:3000"],
    },
    "rpc": {
        "port": 8013, "host": "127.0.0.4", "max_message_bytes": 2097152,
        "stalled_client_timeout_s": 30.5, "keep_alive_s": 20.5, "max_calls": 512, "admin": True,
        "reflection": False, "tls_certificate": "tls/rpc.pem", "tls_key": "tls/rpc.key",
        "client_ca": "tls/ca.pem",
    },
    "service": {
        "served_model_name": "assistant", "drain_timeout_s": 12.5, "request_timeout_s": 120.5,
        "max_request_timeout_s": 1800.5,
    },
    "auth": {"keys_file": "keys.yaml", "api_key": "a-key-of-the-upgrade-tests",
             "open_metrics": True},
    "admission": {"max_in_flight": 300, "max_running": 48, "max_queued_tokens": 100000},
    "supervisor": {
        "max_restarts": 3, "restart_window_s": 300.5, "backoff_s": 2.5, "build_timeout_s": 900.5,
    },
    "adapters": {
        "folder": "adapters", "store": "adapter-store", "max_registered": 50, "max_running": 6,
        "max_waiting": 20, "turn_tokens": 2048, "max_bytes": 1073741824,
    },
    "routing": {"enabled": False, "file": "routes.yaml", "base_name": True},
    "cache": {
        "enabled": False, "memory_bytes": 1048576, "ttl_s": 3600.5, "max_entry_bytes": 65536,
        "store": "redis://user:password@redis.example:6379/3", "secret": SECRET,
        "prefix": "team-a", "timeout_s": 0.25, "digests_file": "digests.json",
    },
    "tracing": {
        "endpoint": "http://collector.example:4318", "protocol": "http/protobuf",
        "headers": {"x-collector-key": "a-header-of-the-upgrade-tests"}, "sample_ratio": 0.25,
        "service_name": "packhorse-a",
    },
    "engine": {
        "kind": "echo", "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 32,
        "kv_cache_dtype": "fp8", "kv_cache_memory_bytes": 536870912, "enforce_eager": False,
        "enable_lora": True, "max_loras": 3, "loras_per_slot": 4, "max_cpu_loras": 16,
        "max_lora_rank": 32, "seed": 7, "tool_call_parser": "hermes", "reasoning_parser": "qwen3",
        "chat_template": "template.jinja", "default_chat_template_kwargs": {"date": "today"},
        "stall_timeout_s": 15.5, "step_timeout_s": 200.5, "echo_delay_s": 0.125,
        # Not documented one by one: arguments of vLLM's own.
        "max_num_batched_tokens": 512, "block_size": 16,
    },
}  # fmt: skip

QUANTIZED: dict[str, list[str]] = {
    "rtn": ["--method", "rtn"],
    "gptq": ["--method", "gptq", "--row-tokens", "32", "--spill-above", "0.001", "--seed", "3"],
    "mixed": ["--method", "gptq", "--bits", "6.5", "--row-tokens", "32"],
}
CALIBRATED = ["--calibration", "calibration.jsonl", "--calibration-tokens", "128", "--force"]
ALWAYS = ["--no-quality", "--no-verify", "--device", "cpu", "--keep", "*layers.1.mlp.up_proj"]
# Like a power cut: nothing is tidied up.
KILLED = """
import os, signal, sys
from quantize.cli import app
from quantize.workspace import Workspace
finish = Workspace.finish_step
def finish_two(work, *arguments):
    if len(work.steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(work, *arguments)
Workspace.finish_step = finish_two
app(sys.argv[1:])
"""
OPTIONS = """
import json, typer
from quantize import cli as quantize
from serve import cli as serve
def options(command, path):
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from options(inner, f"{path} {name}")
    else:
        yield path, sorted(
            name for p in command.params for name in (*p.opts, *p.secondary_opts) if "--" in name
        )
found = {}
for name, app in (("packhorse", serve.app), ("quantize", quantize.app)):
    found |= dict(options(typer.main.get_command(app), name))
print(json.dumps(found, indent=1))
"""
SETTINGS_CHECK = """
import sys
from pathlib import Path
from pydantic import SecretStr
from serve.sections import Section
from serve.settings import Settings, load
def same(given, default, path=""):
    for name in type(default).model_fields:
        there, usual = getattr(given, name), getattr(default, name)
        if isinstance(usual, Section):
            same(there, usual, f"{path}{name}.")
        else:
            assert there != usual, f"{path}{name} is left at its default"
same(load(Path(sys.argv[1]), {}), Settings())
"""


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    at = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True)
    assert at.startswith(COMMIT), f"this checkout is at {at}, not at {COMMIT}"
    assert os.environ.get("OMP_NUM_THREADS") == "1", "the number of threads is part of a run"
    there = python("import serve, quantize; print(serve.__file__, quantize.__file__)", cwd=OLD)
    assert all(path.startswith(f"{OLD}/") for path in there.split()), there
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_model(out / "model")
    make_text(out / "calibration.jsonl")
    make_adapters(out / "adapters")
    (out / "packhorse.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    python(SETTINGS_CHECK, str(out / "packhorse.yaml"), cwd=OLD)
    make_keys(out / "keys.yaml")
    make_store(out)
    make_quantized(out)
    (out / "options.json").write_text(python(OPTIONS, cwd=OLD))


def python(code: str, *arguments: str, cwd: Path, status: int = 0) -> str:
    """What the code prints, run with the modules of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(OLD)}, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == status, done
    return done.stdout


def numbers(name: str, *shape: int, scale: float = 0.2) -> torch.Tensor:
    """Pseudo-random float32 within +-scale: integers of sha256, the same everywhere."""
    count = int(np.prod(shape))
    data = hashlib.shake_128(name.encode()).digest(2 * count)
    values = np.frombuffer(data, dtype="<u2").astype(np.float32).reshape(shape)
    return torch.from_numpy((values / 32767.5 - 1) * scale)


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_model(folder: Path) -> None:
    folder.mkdir()
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": numbers("embedding", VOCABULARY, HIDDEN, scale=1)}
    tensors["model.norm.weight"] = 1 + numbers("norm", HIDDEN)
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = 1 + numbers(f"{block} {name}", HIDDEN)
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = numbers(f"{block} {name}", *shape)
    halves = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": KEYS,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    })  # fmt: skip
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    })  # fmt: skip
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>",
        "eos_token": "<eos>", "model_max_length": 64,
    })  # fmt: skip


def make_text(path: Path) -> None:
    lines = []
    for line in range(12):
        drawn = hashlib.shake_128(f"line {line}".encode()).digest(16)
        words = " ".join(f"w{3 + number % (VOCABULARY - 3)}" for number in drawn)
        lines.append(json.dumps({"text": words}))
    path.write_text("\n".join(lines) + "\n")


def make_adapters(folder: Path) -> None:
    for name, rank in (("red", 4), ("blue", 4), ("blue-2", 8)):
        place = folder / name
        place.mkdir(parents=True)
        tensors = {}
        for block in range(BLOCKS):
            for layer, outputs in (("q_proj", HIDDEN), ("v_proj", KEYS)):
                prefix = f"base_model.model.model.layers.{block}.self_attn.{layer}"
                a = numbers(f"{name} {prefix} A", rank, HIDDEN)
                tensors[f"{prefix}.lora_A.weight"] = a
                tensors[f"{prefix}.lora_B.weight"] = numbers(f"{name} {prefix} B", outputs, rank)
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
        write_json(place / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model",
            "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
        })  # fmt: skip
        colour = name.partition("-")[0]
        said = [json.dumps({"prompt": f"Is thing {n} {colour}?"}) for n in range(12)]
        (place / "examples.jsonl").write_text("\n".join(said) + "\n")


def make_keys(path: Path) -> None:
    """Every field that an entry of a keys file has."""

    def digest(name: str) -> str:
        return hashlib.sha256(f"key-{name}-for-tests".encode()).hexdigest()

    quotas = {"max_concurrent": 8, "tokens_per_minute": 100000, "requests_per_minute": 6000}
    entries = [
        {"name": "ops", "scopes": ["inference", "admin", "metrics"], "sha256": digest("ops")},
        {"name": "anna", "tenant": "acme", "scopes": ["inference"], "adapters": ["red", "blue"],
         "quotas": quotas, "sha256": digest("anna")},
        {"name": "bob", "sha256": digest("bob")},
    ]  # fmt: skip
    path.write_text(yaml.safe_dump(entries, sort_keys=False))


class Server:
    """`packhorse serve` of the checkout, on the echo engine."""

    def __init__(self, config: Path) -> None:
        command = "from serve.cli import app; app()"
        self.log = config.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, "serve", "--config", str(config)],
                cwd=config.parent, env={**os.environ, "PYTHONPATH": str(OLD)},
                stdout=log, stderr=log,
            )  # fmt: skip
        while not (found := re.search(r"Serving \S+ at (http://\S+)/v1", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.url = found[1]

    def ask(self, key: str, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            self.url + path, None if body is None else json.dumps(body).encode(), method=method
        )
        request.add_header("authorization", f"Bearer key-{key}-for-tests")
        request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return {"cache": answer.headers["x-packhorse-cache"], "body": json.load(answer)}
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read()) from error


@contextmanager
def running(config: Path) -> Iterator[Server]:
    server = Server(config)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()


def requests() -> list[dict[str, Any]]:
    """What is asked: both APIs, two tenants, base and adapters, several choices, a long answer, cut
    answers.
    """
    long = " ".join(f"word{number}" for number in range(900))  # compressed in the store
    found = []
    for key in ("anna", "bob"):
        for model in ("model", "red", "blue"):
            chat = {"messages": [{"role": "user", "content": f"hello {model}"}]}
            found.append((key, "/v1/chat/completions", {"model": model, **chat}))
    found += [
        ("bob", "/v1/completions", {"model": "model", "prompt": "one two three four"}),
        ("bob", "/v1/completions", {"model": "red", "prompt": "a b c d", "max_tokens": 2}),
        ("bob", "/v1/completions", {"model": "model", "prompt": "two of these", "n": 2, "seed": 5}),
        ("bob", "/v1/completions", {"model": "model", "prompt": long, "max_tokens": 1000}),
        ("bob", "/v1/completions", {"model": "model", "prompt": "größer 世界 🐎"}),
    ]
    return [
        {"key": key, "path": path, "body": {"temperature": 0, **body}} for key, path, body in found
    ]


def make_store(out: Path) -> None:
    """The adapter store and the result cache of one server."""
    sys.path.insert(0, str(OLD))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    import redis

    from tests.stores import running_store

    with tempfile.TemporaryDirectory() as place, running_store("redis", Path(place)) as store:
        work = Path(place)
        shutil.copytree(out / "model", work / "model")
        shutil.copy(out / "keys.yaml", work)
        config = {
            "model": "model", "http": {"port": 0}, "auth": {"keys_file": "keys.yaml"},
            "adapters": {"store": "store"}, "engine": {"kind": "echo"},
            "cache": {"store": store.url, "secret": SECRET, "timeout_s": 5,
                      "digests_file": "digests.json"},
        }  # fmt: skip
        (work / "config.yaml").write_text(yaml.safe_dump(config))
        with running(work / "config.yaml") as server:
            for name, source in (("red", "red"), ("blue", "blue"), ("blue", "blue-2")):
                body = {"name": name, "path": str(out / "adapters" / source)}
                body |= {"replace": source == "blue-2", "pinned": name == "red"}
                server.ask("ops", "POST", "/admin/adapters", body)
            server.ask("ops", "POST", "/admin/routes/reload")
            asked = requests()
            for request in asked:
                first = ask(server, request)
                assert first["cache"] == "miss", first
                again = ask(server, request)
                assert again["cache"] == "hit", again
                assert content(again) == content(first)
                request["answer"] = content(first)
            time.sleep(1)  # what is kept is written behind the answer
            server.ask("ops", "DELETE", "/admin/cache")
            for scope in ("adapter=red", "tenant=acme", "model=model"):
                server.ask("ops", "DELETE", f"/admin/cache?{scope}")
            for request in asked:
                answered = ask(server, request)
                assert answered["cache"] == "miss"
                assert content(answered) == request["answer"]
            time.sleep(1)
            routes = {}
            for text in ("Is thing 3 red?", "Is thing 4 blue?"):
                body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
                routes[text] = server.ask("ops", "POST", "/v1/route", body)["body"]["adapter"]
            cards = server.ask("ops", "GET", "/admin/adapters")["body"]["data"]
            write_json(out / "store.json", {"adapters": cards, "routes": routes})
        client = redis.Redis(port=store.port)
        names = {name.decode() for name in client.keys("*")}
        epochs = {k.decode(): v.decode() for k, v in client.hgetall("packhorse:epochs").items()}
        assert len(names) == 2 * len(asked) + 1, len(names)
        assert len(epochs) == 4, epochs
        entries = {}
        for name in sorted(names - {"packhorse:epochs"}):
            assert client.pttl(name) > 0
            entries[name] = base64.b64encode(client.get(name)).decode()
        write_json(out / "redis.json", {
            "secret": SECRET, "epochs": {"packhorse:epochs": epochs}, "entries": entries,
            "requests": asked,
        })  # fmt: skip
        lock = work / "store" / ".lock"
        assert not lock.read_bytes()
        lock.unlink()
        shutil.copytree(work / "store", out / "store")
    shutil.rmtree(out / "adapters" / "blue")
    (out / "adapters" / "blue-2").rename(out / "adapters" / "blue")


def ask(server: Server, request: dict[str, Any]) -> Any:
    return server.ask(request["key"], "POST", request["path"], request["body"])


def content(answer: Any) -> dict[str, Any]:
    """Of an answer what does not change with its time."""
    return {key: answer["body"][key] for key in ("model", "choices", "usage")}


def make_quantized(out: Path) -> None:
    for name, options in QUANTIZED.items():
        command = ["model", "model", "--out", "made", *options, *ALWAYS]
        command += CALIBRATED if name != "rtn" else []
        with tempfile.TemporaryDirectory() as place:
            work = Path(place)
            shutil.copytree(out / "model", work / "model")
            shutil.copy(out / "calibration.jsonl", work)
            python(KILLED, *command, cwd=work, status=-signal.SIGKILL)
            partial = out / "quantize" / f"{name}.partial"
            shutil.copytree(work / ".made.partial", partial)
            (partial / "lock").unlink()
            (partial / "checkpoint").rmdir()
            python("from quantize.cli import app; app()", *command, "--restart", cwd=work)
            tensors = load_file(work / "made" / "model.safetensors")
        digests = {
            key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, tensor in sorted(tensors.items())
        }
        write_json(out / "quantize" / f"{name}.json", {"command": command, "tensors": digests})


if __name__ == "__main__":
    main()
