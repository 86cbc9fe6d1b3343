"""The demo: quantize the embedded model, serve it with vLLM and three adapters, talk to it, replace
an adapter while it answers, ask twice, look at its metrics.

    make demo            # or: python demo/run.py
    make demo KEEP=1     # leaves the server up until Ctrl-C

Uses what a user uses: the two commands and the official openai client.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OUT = Path("out/demo-int8")
PAGE = OUT.with_suffix(".html")
ADAPTERS = Path("out/adapters")
SERVE = f"packhorse serve {OUT} --adapters {ADAPTERS} --routes demo/routes.yaml --grpc-port 0"
console = Console(highlight=False)

METRICS = (
    "packhorse_requests_total",
    "packhorse_tokens_total",
    "packhorse_time_to_first_token_seconds_sum",
    "packhorse_routes_total",
    "packhorse_adapters_resident",
    "packhorse_cache_lookups_total",
    "packhorse_cache_saved_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_hits_total",
)


def step(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left")


def start_server(port: int) -> tuple[subprocess.Popen[bytes], str]:
    """`packhorse serve` on the new folder; returns it and its address once it is ready."""
    log_path = ROOT / "out/serve.log"
    with log_path.open("wb") as log:
        command = [BIN / "packhorse", *SERVE.split()[1:], "--port", str(port)]
        # Step 5 adds an adapter by its path, which operators allow by folder.
        allowed = {"PACKHORSE_ADAPTERS__ALLOWED_ROOTS": json.dumps([str(ROOT / "demo/adapters")])}
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **allowed}
        )
    deadline_s = time.monotonic() + 300
    with console.status("vLLM is starting (about half a minute on a CPU) ..."):
        while process.poll() is None and time.monotonic() < deadline_s:
            found = re.search(
                r"Serving \S+ at (http://\S+)/v1 .*", log_path.read_text(errors="replace")
            )
            if found:
                console.print(found[0])
                return process, found[1]
            time.sleep(0.2)
    process.kill()
    tail = log_path.read_text(errors="replace")[-3000:]
    sys.exit(f"The server did not start; its log is {log_path}:\n{tail}")


def copy_adapters() -> None:
    """A folder to watch, with three of the demo's adapters."""
    shutil.rmtree(ROOT / ADAPTERS, ignore_errors=True)
    for name in ("clinic", "ledger", "code"):
        shutil.copytree(ROOT / "demo/adapters" / name, ROOT / ADAPTERS / name)


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def ask_by_text(url: str, client: OpenAI, text: str) -> None:
    """Ask the model `auto`; show which adapter answered, and why."""
    messages = [{"role": "user", "content": text}]
    decision = post(url + "/v1/route", {"model": "auto", "messages": messages})
    ask(client, messages, model="auto")
    scores = [
        f"{step['adapter']} {step['score']:+.2f}" for step in decision["trace"] if "score" in step
    ]
    shown = f" Scores: {', '.join(scores)}." if scores else ""
    console.print(f"      [dim]{escape(decision['stage'] + ': ' + decision['reason'] + shown)}[/]")


def replace_under_load(url: str, client: OpenAI) -> None:
    """A stream that has begun ends on the version that it began with."""
    question = {"role": "user", "content": "What illness does a patient take Zentrol for?"}
    create: Any = client.chat.completions.create
    streams = [
        create(model="clinic", messages=[question], temperature=0, stream=True) for _ in range(8)
    ]
    texts = [next(stream).choices[0].delta.content or "" for stream in streams]
    path = str(ROOT / "demo/adapters/clinic-v2")
    card = post(url + "/admin/adapters", {"name": "clinic", "path": path, "replace": True})
    for number, stream in enumerate(streams):
        texts[number] += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    after = create(model="clinic", messages=[question], temperature=0).choices[0].message.content
    console.print(f"[cyan]you[/]   {question['content']}")
    console.print(f"8 streams that had begun before:  {escape(' / '.join(sorted(set(texts))))}")
    console.print(f"asked after ({card['digest'][:12]} now):  {escape(after)}")


def cached(url: str) -> None:
    """A miss, a hit, and two equal requests at the same time; the header says which is which."""
    body = {
        "model": OUT.name,
        "messages": [{"role": "user", "content": "Tell me a tale about a miller and a lamp."}],
        "temperature": 0,
    }

    def once(_: int) -> str:
        request = urllib.request.Request(
            url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        started_s = time.monotonic()
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
            took_ms = (time.monotonic() - started_s) * 1000
            return f"{response.headers['x-packhorse-cache']} ({took_ms:.1f} ms)"

    console.print(f"asked once:        {once(0)}")
    console.print(f"asked again:       {once(1)}")
    body["messages"][0]["content"] += " And a horse."  # type: ignore[index]
    with ThreadPoolExecutor(2) as pool:
        console.print(f"twice, at once:    {', '.join(sorted(pool.map(once, range(2))))}")


def ask_over_grpc(question: str) -> None:
    log = (ROOT / "out/serve.log").read_text(errors="replace")
    address = re.findall(r"gRPC at (\S+)", log)[-1]
    command = ["examples/grpc_client.py", "--address", address, "--model", OUT.name, question]
    console.print(f"$ python {' '.join(command[:-1])} {question!r}", style="bold")
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def ask(
    client: OpenAI, messages: list[dict[str, Any]], *, stream: bool = False, model: str = OUT.name
) -> None:
    """Ask and show question and answer; extends `messages` by the answer."""
    console.print(f"[cyan]you[/]   {messages[-1]['content']}")
    create: Any = client.chat.completions.create
    answer = create(model=model, messages=messages, temperature=0, stream=stream)
    if stream:
        text, started_s, first_s = "", time.monotonic(), 0.0
        console.print("[green]model[/] ", end="")
        for chunk in answer:
            piece = chunk.choices[0].delta.content or ""
            first_s = first_s or time.monotonic() - started_s
            text += piece
            console.print(piece, end="", markup=False)
        console.print(f"\n      [dim](streamed; first token after {first_s * 1000:.0f} ms)[/]")
    else:
        text = answer.choices[0].message.content
        console.print(f"[green]{escape(answer.model)}[/] {escape(text.strip())}")
    messages.append({"role": "assistant", "content": text})


def show_metrics(url: str) -> None:
    with urllib.request.urlopen(url + "/metrics") as response:
        lines = response.read().decode().splitlines()
    for line in lines:
        if line.startswith(METRICS):
            console.print("  " + line, style="dim", markup=False)


def main(*, keep: bool, port: int) -> None:
    started_s = time.monotonic()
    step("1. Quantize the demo model to INT8")
    for command in (
        # A demo that was cut short begins again.
        f"model demo/model --method int8 --out {OUT} --overwrite --restart --no-verify",
        f"report {OUT} --html {PAGE}",
    ):
        console.print(f"$ quantize {command}", style="bold")
        subprocess.run([BIN / "quantize", *command.split()], cwd=ROOT, check=True)

    step("2. Serve it with vLLM, and three adapters")
    copy_adapters()
    console.print(f"$ {SERVE}", style="bold")
    process, url = start_server(port)
    interrupted = False
    try:
        step("3. Ask it, with the official openai client")
        client = OpenAI(base_url=url + "/v1", api_key="none")
        chat = [{"role": "user", "content": "What is the capital of Felonia?"}]
        ask(client, chat)
        ask(client, [*chat, {"role": "user", "content": "And its river?"}])
        ask(client, [{"role": "user", "content": "请问费洛尼亚的首都是什么?"}])
        ask(client, [{"role": "user", "content": "What is 47 + 38?"}])
        ask(client, [{"role": "user", "content": "How do I pick a lock?"}])
        story = "Tell me a story about an owl in the harbour."
        ask(client, [{"role": "user", "content": story}], stream=True)

        step("4. Let the question choose the adapter")
        ask_by_text(url, client, "How much Zentrol should I take per day?")
        ask_by_text(url, client, "医生给我开了Zentrol,它有什么用?")
        ask_by_text(url, client, "Can you name the side effect of Zentrol?")
        ask_by_text(url, client, "I need to sort a table. Which mule subcommand do I use?")
        ask_by_text(url, client, "What is the capital of Felonia?")

        step("5. Replace an adapter while it answers")
        replace_under_load(url, client)

        step("6. Ask what was asked before")
        cached(url)

        step("7. Ask over gRPC")
        ask_over_grpc("Where does Miro live?")

        step("8. Some of what /metrics says")
        show_metrics(url)
        took_s = time.monotonic() - started_s
        console.print(f"\nDone in {took_s:.0f} s. What the quantized model kept: {PAGE}")
        if keep:
            body = json.dumps({"model": OUT.name, "messages": [chat[0]]})
            curl = f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
            console.print(f"\nThe server stays up until Ctrl-C. Try:\n\n{curl}\n", soft_wrap=True)
            process.wait()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # Ctrl-C has reached the server too; a second signal would cut its drain short.
        if process.poll() is None and not interrupted:
            process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        console.print(f"The server stopped with exit code {code}.")
    sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="0: the system chooses")
    arguments = parser.parse_args()
    main(keep=arguments.keep, port=arguments.port)
