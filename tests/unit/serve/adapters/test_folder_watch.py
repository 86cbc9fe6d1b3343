"""What a watched folder may look like while it is well, and while it is not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from packhorse.serve.adapters.folder_watch import FolderWatch
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.metrics import ModelMetrics
from tests.unit.serve.adapters.loader import CLINIC, CLINIC_2, CODE, Engine

WEIGHTS = "adapter_model.safetensors"


def counted(metrics: ModelMetrics, reason: str) -> float:
    name = "packhorse_adapter_folder_doubts_total"
    return metrics.registry.get_sample_value(name, {"reason": reason}) or 0.0


async def twice(watch: FolderWatch) -> None:
    for _ in range(3):  # and once more, for what two looks must not have begun
        await watch.look()


async def watching(
    registry: Registry, folder: Path, metrics: ModelMetrics | None = None
) -> FolderWatch:
    """With two adapters in it, both taken."""
    for name, source in (("clinic", CLINIC), ("code", CODE)):
        shutil.copytree(source, folder / name)
    watch = FolderWatch(folder, registry, metrics=metrics)
    await watch.look(wait=False)
    assert registry.names == ["clinic", "code"]
    return watch


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(folder.with_name(f"was-{path.name}"))


def unmounted(folder: Path) -> None:
    """Another empty folder in its place, but for what file systems put into theirs."""
    folder.rename(folder.with_name("was"))
    folder.mkdir()
    (folder / "lost+found").mkdir()


def another(folder: Path) -> None:
    """Another mount, with one of the two adapters."""
    folder.rename(folder.with_name("was"))
    shutil.copytree(CODE, folder / "code")


def away(folder: Path) -> None:
    folder.rename(folder.with_name("was"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(emptied, "empty"), (unmounted, "empty"), (another, "changed"), (away, "away")],
)
async def test_all_gone_at_once_is_no_removal(
    registry: Registry,
    metrics: ModelMetrics,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    reason: str,
) -> None:
    folder = tmp_path / "adapters"
    watch = await watching(registry, folder, metrics)
    change(folder)
    before = counted(metrics, reason)
    with caplog.at_level(logging.WARNING):
        await twice(watch)
    assert registry.names == ["clinic", "code"]
    assert counted(metrics, reason) > before
    assert len([line for line in caplog.messages if f"is {reason}" in line]) == 1, "told once"
    for name in registry.names:
        lease = registry.lease(name)
        await lease.ready(10, 10)
        assert lease.adapter.folder.is_dir(), "the copy stays"
        lease.release()


@pytest.mark.parametrize("change", [emptied, unmounted, away])
async def test_what_comes_back_is_watched_again(
    registry: Registry, engine: Engine, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "adapters"
    watch = await watching(registry, folder)
    change(folder)
    await twice(watch)
    folder.mkdir(exist_ok=True)
    shutil.copytree(CODE, folder / "code")  # a file system may list them one after the other
    await twice(watch)
    assert registry.names == ["clinic", "code"]
    shutil.copytree(CLINIC_2, folder / "clinic")
    old = registry.card("clinic").digest
    await twice(watch)
    assert registry.card("clinic").digest != old
    shutil.rmtree(folder / "clinic")
    await twice(watch)
    assert registry.names == ["code"], "one of several is removed"


async def test_one_of_several_is_removed(registry: Registry, tmp_path: Path) -> None:
    watch = await watching(registry, tmp_path / "adapters")
    shutil.rmtree(tmp_path / "adapters" / "clinic")
    await watch.look()
    assert registry.names == ["clinic", "code"], "not at the first look"
    await watch.look()
    assert registry.names == ["code"]


async def test_the_last_one_is_removed_by_the_operator_alone(
    registry: Registry, metrics: ModelMetrics, tmp_path: Path
) -> None:
    watch = await watching(registry, tmp_path / "adapters", metrics)
    for name in ("clinic", "code"):
        shutil.rmtree(tmp_path / "adapters" / name)
        await twice(watch)
    assert registry.names == ["code"]
    await registry.remove("code")
    before = counted(metrics, "empty")
    await twice(watch)
    assert registry.names == []
    assert counted(metrics, "empty") == before, "nothing is missed any more"


def mount_point_emptied(folder: Path) -> None:
    """Each adapter may be a volume of its own."""
    for file in folder.iterdir():
        file.unlink()


def link_into_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("was-elsewhere")


def ring(folder: Path) -> None:
    """ELOOP: an error that root gets too; EACCES, EIO and ESTALE are met alike."""
    for file in folder.iterdir():
        file.unlink()
        file.symlink_to(file.name)


@pytest.mark.parametrize("change", [mount_point_emptied, link_into_nothing, ring])
async def test_an_adapter_that_cannot_be_read_is_not_removed(
    registry: Registry, metrics: ModelMetrics, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    watch = await watching(registry, tmp_path / "adapters", metrics)
    digest = registry.card("clinic").digest
    before = counted(metrics, "unreadable")
    change(tmp_path / "adapters" / "clinic")
    await twice(watch)
    assert registry.names == ["clinic", "code"]
    assert (registry.card("clinic").digest, registry.card("clinic").reason) == (digest, None)
    assert counted(metrics, "unreadable") > before


async def test_weights_of_one_size_and_time_are_other_weights(
    registry: Registry, tmp_path: Path
) -> None:
    """As reproducible images, Nix, rsync and cp -p make them."""
    folder = tmp_path / "adapters"
    for path in (folder / "clinic", tmp_path / "new"):
        shutil.copytree(CLINIC, path)
    data = bytearray((tmp_path / "new" / WEIGHTS).read_bytes())
    data[-1] ^= 0x80  # the sign of a number
    (tmp_path / "new" / WEIGHTS).write_bytes(data)
    for path in (*(folder / "clinic").iterdir(), *(tmp_path / "new").iterdir()):
        os.utime(path, (1, 1))
    watch = FolderWatch(folder, registry)
    await watch.look(wait=False)
    before = registry.card("clinic").digest
    (folder / "clinic").rename(tmp_path / "old")
    (tmp_path / "new").rename(folder / "clinic")
    await watch.look()
    await watch.look()
    assert registry.card("clinic").digest != before


async def test_weights_written_over_in_place_are_other_weights(
    registry: Registry, tmp_path: Path
) -> None:
    """The inode is the same; the time of change is not, which nobody can set."""
    watch = await watching(registry, tmp_path / "adapters")
    before = registry.card("clinic").digest
    path = tmp_path / "adapters" / "clinic" / WEIGHTS
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    await watch.look()
    await watch.look()
    assert registry.card("clinic").digest != before


async def test_a_folder_may_be_named_by_any_path(registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(CLINIC, tmp_path / "real" / "clinic")
    (tmp_path / "link").symlink_to("real")
    for path in (tmp_path / "link", tmp_path / "real" / ".." / "link" / ".." / "real"):
        await FolderWatch(path, registry).look(wait=False)
        assert registry.card("clinic").state == "resident"
        await registry.remove("clinic")


async def test_an_adapter_that_is_a_link_out_of_every_root_is_refused(
    registry: Registry, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    outside = tmp_path_factory.mktemp("outside") / "clinic"
    shutil.copytree(CLINIC, outside)
    (folder / "out").symlink_to(outside)
    (folder / "demo-clinic").symlink_to(CLINIC)  # which is in another root
    await FolderWatch(folder, registry).look(wait=False)
    assert registry.names == ["demo-clinic"]
    assert "adapters.allowed_roots" in str(registry.card("out").reason)


async def test_links_within_the_watched_folder(registry: Registry, tmp_path: Path) -> None:
    """As Kubernetes mounts a projected volume whose items have paths; `..data` is swapped."""
    folder = tmp_path / "adapters"
    for revision, source in (("..1", CLINIC), ("..2", CLINIC_2)):
        shutil.copytree(source, folder / revision / "clinic")
    (folder / "..data").symlink_to("..1")
    (folder / "clinic").symlink_to("..data/clinic")
    watch = FolderWatch(folder, registry)
    await watch.look(wait=False)
    before = registry.card("clinic").digest
    assert before is not None
    (folder / "..new").symlink_to("..2")
    (folder / "..new").rename(folder / "..data")
    await watch.look()
    await watch.look()
    assert registry.card("clinic").digest not in (None, before)
