"""A performance gate that noise cannot break: CPU per streamed token of our own layers, against the
same of the commit before. Ends in one line of JSON.

    python bench/gate.py                    # 30 to 50 s on two cores, up to 3 minutes if too slow
    python bench/gate.py --base v1.0        # against any other commit

Both trees' servers are up at once, `packhorse serve --engine echo` with the settings that users
have: result cache on, one log line a request. They get the load in turn, A B B A, in short rounds
of streamed greedy chats whose prompts are all different, so that the cache misses and stores. What
counts is the CPU time of the server's process in each round, and of that the ratio within each
pair: a machine that is slow for a while is so for both. The median of the ratios has an interval
from their order alone, which a few spoilt rounds cannot move.

Too slow is a median above LIMIT whose interval begins above SURE_FROM, twice: the second time with
new processes and twice the rounds. What the gate cannot see is a slow-down in many small steps, and
one that needs a pause between tokens to show: the echo engine makes none.

The commit before is the one before the newest that changed serve/, or HEAD when there are changes
in serve/ that are not committed. Where the two cannot be compared (no git, no commit before, a
commit whose server does not take this load), the gate says so and ends with 0; with 1 when this
tree is too slow or does not serve.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ladder import progress
from load import Load, LoadError, run_cell
from servers import MODEL, Server, _running, free_port

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.25
SURE_FROM = 1.10
CONFIDENCE = 0.95
PAIRS = 12
# Answers as long as a usual one in a chat, so that a request's own cost counts as it does for
# users. The echo engine ends with `length` only when it had more to say: one word more than tokens.
ROUND = Load(320, 32, stream=True, seed="", prompt_tokens=129, output_tokens=128, kind="chat")
# Says which tree it runs, then is the `packhorse` command.
COMMAND = """\
import importlib, os, pathlib, sys
has_package = pathlib.Path(os.environ["PYTHONPATH"], "packhorse").is_dir()  # since 2026-11
serve = importlib.import_module("packhorse.serve" if has_package else "serve")
pathlib.Path(sys.argv.pop(1)).write_text(serve.__file__)
importlib.import_module(serve.__name__ + ".cli").app()
"""
Side = Literal["before", "now"]


class NotComparable(Exception):
    """There is nothing to hold this tree against; the message says why."""


class Failed(Exception):
    """A server did not start or did not bear the load."""

    def __init__(self, side: Side, error: Exception) -> None:
        super().__init__(str(error))
        self.side = side


@dataclass(frozen=True)
class Measured:
    """One measurement: CPU microseconds per token, round by round, pair by pair."""

    rounds_us: dict[Side, list[float]]
    others_cpus: list[float]
    """Of each round: how many CPUs were busy with something else."""

    @property
    def ratios(self) -> list[float]:
        both = zip(self.rounds_us["now"], self.rounds_us["before"], strict=True)
        return [now_us / before_us for now_us, before_us in both]

    def summary(self) -> dict[str, Any]:
        ratio = statistics.median(self.ratios)
        low, high = median_interval(self.ratios)
        return {
            "ratio": round(ratio, 4),
            "interval": [round(low, 4), round(high, 4)],
            "too_slow": ratio > LIMIT and low > SURE_FROM,
            "us_per_token": {
                side: round(statistics.median(rounds), 2) for side, rounds in self.rounds_us.items()
            },
            "others_cpus": round(statistics.median(self.others_cpus), 2),
            "pairs": [round(ratio, 4) for ratio in self.ratios],
        }


def median_interval(values: list[float]) -> tuple[float, float]:
    """Where the median is with at least CONFIDENCE, from at least 6 values: as far from both ends
    as that many fair coins would almost always reach (the sign test, turned round).
    """
    ordered, count = sorted(values), len(values)
    skipped, chance = -1, 0.0
    while True:
        chance += math.comb(count, skipped + 1) / 2**count
        if 2 * chance > 1 - CONFIDENCE:
            break
        skipped += 1
    assert skipped >= 0, f"{count} values are too few"
    return ordered[skipped], ordered[-1 - skipped]


def git(*words: str) -> str:
    """What git says of this checkout. Raises CalledProcessError."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def base_commit(asked: str | None) -> str:
    """The commit to compare with. Raises NotComparable; ValueError when `asked` is none."""
    try:
        top = git("rev-parse", "--show-toplevel")
    except FileNotFoundError:
        raise NotComparable("there is no git") from None
    except subprocess.CalledProcessError as error:
        raise NotComparable(f"git says: {error.stderr.strip()}") from None
    if Path(top).resolve() != ROOT:
        raise NotComparable("this tree is no git checkout")
    changed = git("status", "--porcelain", "--", "serve")
    newest = git("log", "-1", "--format=%H", "--", "serve") or "HEAD"
    revision = asked or ("HEAD" if changed else f"{newest}~1")
    try:
        commit = git("rev-parse", "--verify", "--quiet", revision + "^{commit}")
    except subprocess.CalledProcessError:
        if asked:
            raise ValueError(f"--base {asked}: there is no such commit") from None
        why = "a first commit, or a shallow clone"
        raise NotComparable(f"there is no {revision} ({why})") from None
    return commit


def extract(commit: str, folder: Path) -> None:
    """The commit's serve/ into the folder. Raises NotComparable."""
    packed = folder / "tree.tar"
    try:
        packages = git("ls-tree", "--name-only", commit, "packhorse", "serve").split()
        git("archive", f"--output={packed}", commit, *packages)
    except subprocess.CalledProcessError as error:
        raise NotComparable(f"{commit[:9]} has no serve/: {error.stderr.strip()}") from None
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")


@contextmanager
def serving(side: Side, tree: Path, work_folder: Path) -> Iterator[Server]:
    """A tree's `packhorse serve --engine echo`, whichever tree is installed. Raises Failed."""
    origin, port = work_folder / f"{side}.origin", free_port()
    # PYTHONPATH comes before what is installed as editable. With one seed for both, hashing makes
    # no difference between the processes; settings in the environment are not the users' defaults.
    unset = [f"--unset={name}" for name in os.environ if name.startswith("PACKHORSE_")]
    command = [
        "env", *unset, f"PYTHONPATH={tree}", "PYTHONHASHSEED=0",
        sys.executable, "-c", COMMAND, origin,
        "serve", "--engine", "echo", "--served-model-name", MODEL, "--port", port,
    ]  # fmt: skip
    with ExitStack() as stack:
        try:
            server = stack.enter_context(
                _running(side, command, port, "/health/ready", work_folder)
            )
        except RuntimeError as error:
            raise Failed(side, error) from None
        if Path(origin.read_text()).resolve().parent != (tree / "serve").resolve():
            sys.exit(f"gate: {origin.read_text()} was measured, not {tree}")
        yield server


def round_of(side: Side, server: Server, load: Load) -> tuple[float, float]:
    """One round: CPU microseconds per token, and how many CPUs others had. Raises Failed."""
    try:
        cell, (before, after) = run_cell(server.target, load, server.cpu)
    except LoadError as error:
        raise Failed(side, error) from None
    client_s = cell["client_cpu_us_per_token"] * load.tokens / 1e6
    us = before.per_token_us(after, load.tokens)["api_cpu_us_per_token"]
    return us, before.others(after, client_s)


def measure(before: Path, pairs: int, seed: str, work_folder: Path) -> Measured:
    """Both trees' servers, from their start to their end. Raises Failed."""
    measured = Measured({"before": [], "now": []}, [])
    with serving("now", ROOT, work_folder) as ours, serving("before", before, work_folder) as old:
        servers: dict[Side, Server] = {"before": old, "now": ours}
        for side, server in servers.items():
            round_of(side, server, replace(ROUND, seed=f"{seed}/warm-up"))
        for number in range(pairs):
            load = replace(ROUND, seed=f"{seed}/{number}")
            for side in list(servers) if number % 2 == 0 else reversed(servers):
                us, others_cpus = round_of(side, servers[side], load)
                measured.rounds_us[side].append(us)
                measured.others_cpus.append(others_cpus)
    return measured


def sentence(commit: str, summary: dict[str, Any]) -> str:
    """A measurement for people."""
    us = summary["us_per_token"]
    low, high = summary["interval"]
    return (
        f"gate: {us['now']:.1f} us of CPU per streamed token, {us['before']:.1f} in {commit[:9]}: "
        f"ratio {summary['ratio']:.3f} ({low:.3f} to {high:.3f}, {len(summary['pairs'])} pairs), "
        f"limit {LIMIT}: {'TOO SLOW' if summary['too_slow'] else 'ok'}"
    )


def judge(asked: str | None) -> dict[str, Any]:
    """Measure, and once more if it is too slow. Raises NotComparable, Failed, ValueError."""
    commit = base_commit(asked)
    with tempfile.TemporaryDirectory(prefix="packhorse-gate-") as scratch:
        folder = Path(scratch)
        tree = folder / "before"
        tree.mkdir()
        extract(commit, tree)
        summaries: list[dict[str, Any]] = []
        for pairs in (PAIRS, 2 * PAIRS):
            progress(f"gate: this tree against {commit[:9]}, {pairs} pairs")
            try:
                measured = measure(tree, pairs, f"gate/{pairs}", folder)
            except Failed as error:
                if error.side == "now":
                    raise
                progress(error)
                raise NotComparable(f"{commit[:9]} does not serve this load, see above") from None
            summaries.append(measured.summary())
            last = summaries[-1]
            if not last["too_slow"]:
                break
            progress(sentence(commit, last))
    print(sentence(commit, last))
    return {"base": commit, "met": not last["too_slow"], **last, "measurements": len(summaries)}


def main() -> None:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="the commit to compare with [default: the one before]")
    given = parser.parse_args()
    started_s = time.monotonic()
    try:
        result = judge(given.base)
    except ValueError as error:
        parser.error(str(error))
    except NotComparable as error:
        print(f"gate: nothing to compare with: {error}")
        result = {"met": None}
    except Failed as error:
        sys.exit(f"gate: this tree does not serve: {error}")
    machine = {"machine": platform.machine(), "cpus": os.cpu_count()}
    seconds = round(time.monotonic() - started_s)
    print(json.dumps({"bench": "gate", **machine, "limit": LIMIT, "seconds": seconds, **result}))
    sys.exit(result["met"] is False)


if __name__ == "__main__":
    main()
