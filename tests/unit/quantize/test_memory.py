"""What a process may still take, where a machine's files are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.quantize.model.memory import free_memory_bytes

MACHINE = "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"
NO_LIMIT = str(2**63 - 4096)


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """`files` by their paths below sys/fs/cgroup."""
    below = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/meminfo": MACHINE, "proc/self/cgroup": groups, **below}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, errors="surrogateescape")
    return root


def version_1(limit: int | str, used: int, cached: int = 30, *, at: str) -> dict[str, str]:
    return {
        f"{at}/memory.limit_in_bytes": str(limit),
        f"{at}/memory.usage_in_bytes": str(used),
        f"{at}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cached - 10}\n"
        "total_active_file 10\n",
    }


def version_2(limit: int | str, used: int, cached: int = 30, *, at: str = ".") -> dict[str, str]:
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.current": f"{used}\n",
        f"{at}/memory.stat": "anon 9\ninactive_file 10\nactive_file 20\n"
        f"slab_reclaimable {cached - 30}\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("", {}, 8000 * 1024, id="the machine's"),
        pytest.param("0::/\n", version_2(5000, 3000, 100), 2100, id="a container's"),
        pytest.param("0::/\n", version_2("max", 3000), 8000 * 1024, id="no limit"),
        pytest.param(
            "0::/\n",
            {**version_2("max", 3000), "memory.high": "4000"},
            1030,
            id="a limit that slows down",
        ),
        pytest.param("nonsense\n0::/\udcff\n", version_2(5000, 3000), 2030, id="any bytes"),
        pytest.param("0::/\n", version_2(5000, 6000), 0, id="above its limit"),
        pytest.param(
            "0::/\n", version_2(10**12, 3000), 8000 * 1024, id="more than the machine has"
        ),
        pytest.param(
            "0::/job/step\n",
            {**version_2("max", 10, at="job/step"), **version_2(5000, 4500, at="job")},
            530,
            id="the limit of a group around it",
        ),
        pytest.param(
            "0::/kubepods/pod1\n", version_2(5000, 1000), 4030, id="its own alone is to be seen"
        ),
        pytest.param(
            "12:cpu,cpuacct:/\n4:memory:/docker/1\n0::/\n",
            {
                **version_1(5000, 3000, 100, at="memory/docker/1"),
                **version_1(NO_LIMIT, 10**9, at="memory"),
            },
            2100,
            id="version 1",
        ),
    ],
)
def test_what_is_free(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert free_memory_bytes(system(tmp_path, groups, files)) == expected


def test_nobody_tells(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) is None


def test_here() -> None:
    free = free_memory_bytes()
    assert free is None or free > 2**20
