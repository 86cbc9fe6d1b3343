"""The training process: its answer, and that none is left behind."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from packhorse.serve.errors import DeadlineExceeded, Internal
from packhorse.serve.routing.train import fit
from packhorse.serve.routing.train_process import train
from tests.unit.serve.routing_data import job

# Says who it is in the file named by its first argument, and stays.
STAYS = (
    "import os, pathlib, sys, time;"
    "path = pathlib.Path(sys.argv[1]); part = path.with_suffix('.part');"
    "part.write_text(str(os.getpid())); part.rename(path);"
    "time.sleep(600)"
)


def staying(path: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", STAYS, str(path))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pid_when_there(path: Path) -> int:
    deadline_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return int(path.read_text())


async def pid_in(path: Path) -> int:
    return await asyncio.to_thread(pid_when_there, path)


async def test_a_child_trains_as_this_process_would() -> None:
    small = job(20)
    assert await train(small) == fit(small)


async def test_a_child_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded, match="longer than 2 s"):
        await train(job(20), time_limit_s=2, command=staying(path))
    assert is_gone(await pid_in(path))


async def test_cancelling_kills_the_child(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    training = asyncio.create_task(train(job(20), command=staying(path)))
    pid = await pid_in(path)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert is_gone(pid)


async def test_a_child_gives_way_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    training = asyncio.create_task(train(job(20), command=staying(path)))
    pid = await pid_in(path)
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    async with asyncio.timeout(10):  # the child may be quicker than we are
        while os.getpriority(os.PRIO_PROCESS, pid) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training


async def test_a_child_that_is_killed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    training = asyncio.create_task(train(job(20), command=staying(path)))
    os.kill(await pid_in(path), 9)
    with pytest.raises(Internal, match="exit code -9"):
        await training


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no such thing')", "exit code 1: no such thing"),
        ("print('hello')", "cannot be read"),
        ("pass", "cannot be read"),
    ],
)
async def test_a_child_that_fails_says_how(program: str, message: str) -> None:
    with pytest.raises(Internal, match=message):
        await train(job(20), command=(sys.executable, "-c", program))


async def test_an_orphan_ends_itself() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "packhorse.serve.routing.train_process",
        "1",
        stdin=asyncio.subprocess.PIPE,
    )  # its input never ends
    assert await asyncio.wait_for(process.wait(), 30) == -14  # SIGALRM
    assert process.stdin is not None
    process.stdin.close()


async def test_the_parent_never_loads_scikit_learn() -> None:
    program = (
        "import sys, packhorse.serve.routing.rollout; "
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'scipy', 'vllm', 'fastapi')))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await process.wait() == 0
