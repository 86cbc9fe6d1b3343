"""Where adapters may come from: allowed folders, and nothing that a link in them leads out to,
whenever that link is put there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.adapters import folders
from packhorse.serve.adapters.allowed_roots import AllowedRoots, hub_cache
from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.folders import Source, open_file
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.store import EXAMPLES, AdapterStore
from packhorse.serve.errors import Invalid
from packhorse.serve.settings.adapters import AdapterSettings
from tests.conftest import DEMO
from tests.unit.serve.adapter_makers import ada, made
from tests.unit.serve.adapters.loader import CLINIC

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMITS = AdapterLimits(16, linear_layers(DEMO / "model"), 2**24)


def refusal(roots: AllowedRoots, path: Path) -> str:
    with pytest.raises(Invalid) as caught:
        roots.source(path)
    assert caught.value.param == "path"
    return caught.value.message.replace(repr(str(path)), "PATH")


def test_paths_outside_are_refused_whether_they_exist_or_not(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside, tmp_path / "allowed-too"):
        folder.mkdir()
    (allowed / "link").symlink_to(outside)
    roots = AllowedRoots([allowed])
    paths = [
        outside, tmp_path / "nothing", tmp_path, allowed / "link", tmp_path / "allowed-too",
        allowed / "link" / "nothing", Path("/etc/shadow"), Path("/no/such"), Path(f"{outside}\0"),
        Path(f"{outside}\ud800"),
    ]  # fmt: skip
    said = {refusal(roots, path) for path in paths[:8]}
    assert len(said) == 1
    assert "adapters.allowed_roots" in said.pop()
    for path in paths[8:]:
        assert "adapters.allowed_roots" in refusal(roots, path)  # a user's mistake, no fault
    # Whether the kernel finds what is before the dots would tell if it is there.
    dotted = [tmp_path / name / ".." / "allowed" for name in ("outside", "nothing")]
    assert len({refusal(roots, path) for path in dotted}) == 1
    assert "none" in refusal(AllowedRoots([]), allowed)


def test_paths_inside_are_taken_with_their_root(tmp_path: Path) -> None:
    inner = tmp_path / "real" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    real = tmp_path / "real"
    for root in (real, tmp_path / "link"):
        for path in (real / "a", tmp_path / "link" / "a", real):
            assert AllowedRoots([root]).source(path).root == real
    assert AllowedRoots([inner, real]).source(inner / "a") == Source(inner / "a", real), (
        "the widest"
    )


def test_the_hub_cache_is_where_the_hub_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/somewhere/hub")
    assert hub_cache() == Path("/somewhere/hub")


def test_roots_are_whole_paths() -> None:
    assert AdapterSettings().allowed_roots is None
    assert AdapterSettings(allowed_roots=("~/a",)).allowed_roots == (Path("~/a").expanduser(),)
    with pytest.raises(ValueError, match="'a' is not absolute"):
        AdapterSettings(allowed_roots=("a",))


def of_hub(root: Path) -> Path:
    """As huggingface_hub lays its cache out."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(CLINIC.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def of_config_map(root: Path) -> Path:
    """As Kubernetes mounts a projected volume."""
    shutil.copytree(CLINIC, root / "clinic" / "..2026_11_30")
    (root / "clinic" / "..data").symlink_to("..2026_11_30")
    for file in CLINIC.iterdir():
        (root / "clinic" / file.name).symlink_to(f"..data/{file.name}")
    return root / "clinic"


@pytest.mark.parametrize("make", [of_hub, of_config_map])
def test_links_that_stay_in_the_root_are_followed(
    tmp_path: Path, store: AdapterStore, make: Callable[[Path], Path]
) -> None:
    source = AllowedRoots([tmp_path / "root"]).source(make(tmp_path / "root"))
    linked, plain = store.stage("a", source, LIMITS), store.stage("b", Source.alone(CLINIC), LIMITS)
    assert linked.digest == plain.digest
    for file in linked.folder.iterdir():
        assert not file.is_symlink()
    assert (linked.folder / EXAMPLES).read_bytes() == (CLINIC / EXAMPLES).read_bytes()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EXAMPLES, "notes"])
def test_a_link_out_of_the_root_is_refused(tmp_path: Path, store: AdapterStore, name: str) -> None:
    snapshot = of_hub(tmp_path / "root")
    (tmp_path / "outside").write_text("secret")
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to(tmp_path / "outside")
    source = AllowedRoots([tmp_path / "root"]).source(snapshot)
    with pytest.raises(Invalid, match="is a link out of"):
        store.stage("a", source, LIMITS)


def swapping(at: int, name: str, change: Callable[[Path], Any]) -> Callable[[Path], int]:
    """`folders._find`, but something happens just before a file of that name is looked for the
    `at`-th time.
    """
    find = folders._find
    seen = 0

    def swapped(path: Path) -> int:
        nonlocal seen
        if path.name == name:
            seen += 1
            if seen == at:
                change(path)
        return find(path)

    return swapped


def file_to_a_link(secret: Path) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.rename(path.with_name("was"))
        path.symlink_to(secret / path.name)

    return change


def folder_to_a_link(secret: Path) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.parent.rename(path.parent.with_name("was"))
        path.parent.symlink_to(secret)

    return change


@pytest.mark.parametrize("swap", [file_to_a_link, folder_to_a_link])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(("name", "at"), [(CONFIG, 1), (WEIGHTS, 1), (WEIGHTS, 2), (EXAMPLES, 1)])
def test_what_is_swapped_after_the_check_is_not_read(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, swap: Any, kind: str,
    name: str, at: int,
) -> None:  # fmt: skip
    """The outside has an adapter that would be taken: where it is, is what is wrong with it."""
    root = tmp_path / "root"
    root.mkdir()
    adapter = {} if kind == "lora" else ada()
    layers = {"model.layers.0.self_attn.q_proj": (128, 128)}
    for folder in (root / "a", tmp_path / "secret"):
        (made(folder, **adapter) / EXAMPLES).write_text(json.dumps({"prompt": folder.name}))
    change = swap(tmp_path / "secret")
    monkeypatch.setattr(folders, "_find", swapping(at, name, change))
    limits = AdapterLimits(16, layers, 2**24)
    with pytest.raises(Invalid, match="is a link out of"):
        store.stage("a", AllowedRoots([root]).source(root / "a"), limits)
    assert not list(tmp_path.glob("store/a/*"))


def test_the_same_adapter_again_is_read_as_carefully(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its weights are hashed before anything is written."""
    root = tmp_path / "root"
    shutil.copytree(CLINIC, root / "a")
    shutil.copytree(CLINIC, tmp_path / "secret")
    source = AllowedRoots([root]).source(root / "a")
    store.stage("a", source, LIMITS)
    change = file_to_a_link(tmp_path / "secret")
    monkeypatch.setattr(folders, "_find", swapping(2, WEIGHTS, change))
    with pytest.raises(Invalid, match="is a link out of"):
        store.stage("a", source, LIMITS)


def test_what_was_opened_is_read_whatever_comes_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / CONFIG).write_text("mine")
    (tmp_path / "secret").write_text("secret")
    with open_file(Source.alone(folder), CONFIG) as file:
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(tmp_path / "secret")
        assert file.read() == b"mine"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_neither_read_nor_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / CONFIG)
    with (
        pytest.raises(Invalid, match="not a regular file"),
        open_file(Source.alone(tmp_path), CONFIG),
    ):
        pass


def test_a_ring_of_links(tmp_path: Path) -> None:
    (tmp_path / CONFIG).symlink_to(CONFIG)
    with pytest.raises(Invalid, match="cannot be read"), open_file(Source.alone(tmp_path), CONFIG):
        pass
