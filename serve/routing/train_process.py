"""Training in a child process, because it takes seconds of CPU and holds the GIL.

The server calls `train`; run as a program, this file is the child. They exchange msgpack, never
pickle: a Job on the child's standard input, a Trained on its standard output.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

import msgspec

from packhorse.serve.errors import DeadlineExceeded, Internal
from packhorse.serve.routing.train import Job, Trained, fit

TIME_LIMIT_S = 300.0
# The child ends itself this much later, in case its parent was killed.
GRACE_S = 30
NICER = 10


async def train(
    job: Job,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    command: tuple[str, ...] = (sys.executable, "-m", "packhorse.serve.routing.train_process"),
) -> Trained:
    """Train in a child process, which is killed when this is cancelled or takes too long.

    Raises DeadlineExceeded after `time_limit_s` (wall time), Internal when the child fails; the
    message then ends with the last line of what it wrote to standard error.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        str(int(time_limit_s) + GRACE_S),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    # Lower its priority below that of requests; from here, as its imports alone take a second of
    # CPU.
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICER)
    try:
        async with asyncio.timeout(time_limit_s):
            answer, complaint = await process.communicate(msgspec.msgpack.encode(job))
    except TimeoutError:
        raise DeadlineExceeded(
            f"Training the routes took longer than {time_limit_s:g} s and was ended; give fewer or "
            "shorter examples."
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            # Reads the rest and closes the pipes; shielded against a second cancellation.
            await asyncio.shield(process.communicate())
    if process.returncode != 0:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise Internal(f"Training the routes failed with exit code {process.returncode}: {last}")
    try:
        return msgspec.msgpack.decode(answer, type=Trained)
    except msgspec.DecodeError as error:
        raise Internal(f"Training the routes gave an answer that cannot be read: {error}") from None


def main() -> None:
    """The child: one job in, one result out."""
    signal.alarm(int(sys.argv[1]))
    # Keep what libraries print out of the answer.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    trained = fit(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job))
    with answer:
        answer.write(msgspec.msgpack.encode(trained))


if __name__ == "__main__":
    main()
