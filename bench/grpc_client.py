"""One cell of load over gRPC, in a process of its own; spoken to as bench/load_client.py is.

Chunks are counted and not looked at, but for the last, which has the usage: every answer must have
as many tokens as were asked for.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import grpc
import uvloop
from load import Load, LoadError, token_prompts

from packhorse.serve.rpc.pb import inference_pb2 as pb


def requests_of(load: Load, model: str) -> list[bytes]:
    options = pb.Options(max_tokens=load.output_tokens, temperature=0, ignore_eos=True)
    return [
        pb.CompleteRequest(
            model=model, prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=ids))], options=options
        ).SerializeToString()
        for ids in token_prompts(load)
    ]


async def work(job: dict[str, Any]) -> dict[str, Any]:
    load = Load(**job["load"])
    waiting = requests_of(load, job["model"])
    kind = "CompleteStream" if load.stream else "Complete"
    async with grpc.aio.insecure_channel(job["address"]) as channel:
        make = channel.unary_stream if load.stream else channel.unary_unary
        method = make(f"/packhorse.v1.Inference/{kind}")
        await channel.channel_ready()
        gc.collect()
        gc.freeze()
        gc.disable()
        print('{"ready": true}', flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        chunks = 0

        async def caller() -> None:
            nonlocal chunks
            while waiting:
                last = b""
                if load.stream:
                    async for chunk in method(waiting.pop()):
                        chunks += 1
                        last = chunk
                    usage = pb.CompleteChunk.FromString(last).usage
                else:
                    usage = pb.CompleteResponse.FromString(await method(waiting.pop())).usage
                if usage.completion_tokens != load.output_tokens:
                    raise LoadError(f"not as many tokens as asked for: {usage}")

        cpu_s, started_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(load.concurrency)))
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return {
        "wall_s": wall_s,
        "requests_per_s": load.requests / wall_s,
        "tokens_per_s": load.tokens / wall_s,
        "client_cpu_us_per_token": cpu_s / load.tokens * 1e6,
        # Without the opening and the usage.
        "events_per_token": (chunks - 2 * load.requests) / load.tokens if load.stream else None,
    }


def main() -> None:
    """The client process. Errors go out as JSON too, so that the caller can tell them."""
    job = json.loads(sys.stdin.readline())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            result = runner.run(work(job))
        except (LoadError, OSError, grpc.RpcError) as error:
            result = {"error": str(error)}
    print(json.dumps(result), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
