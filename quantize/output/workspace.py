"""A run's place on disk: what it has finished, so that a killed run can go on where it was, and the
folder that appears under its name all at once.

While a run is on its way, `.<out>.partial` lies beside `out`:

lock            held by the run that writes here
manifest.json   what the run is, and which steps are finished; replaced by a rename
part-00007      tensors that a step made, safetensors
state-00007     a folder: what the next step needs of those before (hidden states)
spill           a folder: what does not fit in memory (quantize/calibration/activation_store.py)
checkpoint      a folder: what becomes `out`

A step counts once the manifest names it, with the sha256 of all its files. Called by `run`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import INDEX, Checkpoint, sha256_of
from packhorse.quantize.output.shards import index_of, merge, shards_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 4 * 1024**3
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
Tensors = dict[str, Tensor]


class Workspace:
    """Use as a context: what holds a finished step outlives an error, all else is removed."""

    def __init__(
        self,
        out: Path,
        source: Path,
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Raises BadInput when `out` may not be made or replaced (never the source or what holds
        it, and nothing but a checkpoint), when another run is making it, or when its disk has no
        room for `needed_bytes`.
        """
        self._out = out.expanduser().resolve()
        self._said = out
        self._shard_bytes = shard_bytes
        self._source = source.resolve()
        self._overwrite = overwrite
        self._check()
        self.root = self._out.parent / f".{self._out.name}.partial"
        self.folder = self.root / "checkpoint"
        self.spill = self.root / "spill"
        self._retired = self._out.parent / f".{self._out.name}.retired"
        self._manifest: dict[str, Any] = {}
        self._has_begun = False
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._manifest = self._read()
            self._undo_half_a_replacement()
            self._sweep()
            self._check_room(needed_bytes)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error}.") from error

    def _check(self) -> None:
        out, overwrite = self._said, self._overwrite
        if self._out in (self._source, *self._source.parents):
            raise BadInput(f"{out} is or holds the original; choose another --out.")
        if self._out.is_dir() and any(self._out.iterdir()):
            if not overwrite:
                raise BadInput(f"{out} exists already; choose another --out or pass --overwrite.")
            if not (self._out / "config.json").is_file():
                raise BadInput(f"{out} is not a checkpoint, so --overwrite leaves it alone.")
        elif self._out.exists() and not self._out.is_dir():
            raise BadInput(f"{out} is a file; choose another --out.")
        if self._out.is_mount():
            raise BadInput(f"{out} is a mount point and cannot be replaced; name a folder in it.")

    def _take_lock(self) -> IO[str]:
        """The system lets go of it when the process ends, however it ends."""
        path = self.root / "lock"
        while True:
            self.root.mkdir(exist_ok=True)
            lock = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                owner = lock.read() or "unknown"
                lock.close()
                raise BadInput(
                    f"Another run (process {owner}) is making {self._said}; wait for it, or choose "
                    "another --out."
                ) from error
            # A run that ended in between has taken the folder away, and this lock with it.
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                return lock
            lock.close()

    def _undo_half_a_replacement(self) -> None:
        if self._retired.exists():
            if self._out.exists():
                shutil.rmtree(self._retired)
            else:
                self._retired.rename(self._out)  # killed between the two renames of publish
                self._check_again()

    def _check_again(self) -> None:
        """Before anything is replaced that was not there when the run began."""
        try:
            self._check()
        except BadInput:
            self.close()
            raise

    def _sweep(self) -> None:
        """Remove what no finished step needs."""
        if self._holds_something and not self.folder.exists():
            self._manifest = {}  # killed just behind the rename that published it
        named = {"lock", MANIFEST, self.folder.name}
        named |= {part["file"] for step in self.steps for part in step["parts"]}
        named |= {name.split("/")[0] for step in self.steps[-1:] for name in step["state"]}
        if not self._holds_something:
            named -= {MANIFEST, self.folder.name}
        for left in self.root.iterdir():
            if left.name not in named:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _check_room(self, needed_bytes: int) -> None:
        there = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        free_bytes = shutil.disk_usage(self._out.parent).free
        if free_bytes + there < needed_bytes:
            self.close()
            raise BadInput(
                f"{self._said} needs {needed_bytes:,} bytes of disk (what it replaces goes last), "
                f"and {free_bytes:,} are free there; make room, or choose another --out."
            )

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._has_begun and self._holds_something:
            error.add_note(
                f"{len(self.steps)} finished steps are kept: the same command with --resume goes "
                "on from there, with --restart it begins again."
            )
        self.close()

    def close(self) -> None:
        """Let go; remove what nobody can go on from."""
        shutil.rmtree(self.spill, ignore_errors=True)
        if not self._holds_something:
            shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def _read(self) -> dict[str, Any]:
        path = self.root / MANIFEST
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:  # not by a kill: it is replaced by a rename
            raise BadInput(f"{path} is damaged ({error}); remove {self.root}.") from error
        return found

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What was said of each finished step."""
        found: list[dict[str, Any]] = self._manifest.get("steps", [])
        return found

    @property
    def _holds_something(self) -> bool:
        return bool(self.steps or self._manifest.get("remembered"))

    def begin(self, run: dict[str, Any], *, resume: bool, restart: bool) -> bool:
        """Say what the run is: whatever its bytes depend on. Returns whether it goes on from steps
        that an earlier one finished. Raises BadInput when one did and nothing is said about it, or
        when it was another run.
        """
        if self._holds_something and not restart:
            if not resume:
                raise BadInput(
                    f"{self._said}: an earlier run was cut short after {len(self.steps)} steps; go "
                    "on from there with --resume, or begin again with --restart."
                )
            earlier = self._manifest["run"]
            if other := [key for key in {**run, **earlier} if run.get(key) != earlier.get(key)]:
                said = "; ".join(
                    f"{key}: {earlier.get(key)} then, {run.get(key)} now" for key in other
                )
                raise BadInput(
                    f"{self._said}: the unfinished run cannot be gone on with, as it was another "
                    f"({said}). Repeat it as it was, or begin again with --restart."
                )
            self._check_files()
            self._has_begun = True
            return True
        for left in self.root.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != "lock":
                left.unlink()
        self.folder.mkdir()
        self._manifest = {"run": run, "steps": [], "shards": {}}
        self._has_begun = True
        return False

    def _check_files(self) -> None:
        for step in self.steps[-1:]:
            for name, digest in step["state"].items():
                self._check_file(self.root / name, digest)
        shards: dict[str, str] = self._manifest["shards"]
        for name, digest in shards.items():
            self._check_file(self.folder / name, digest)
        merged = {part for name, parts in self._shards() if name in shards for part in parts}
        for step in self.steps:
            for part in step["parts"]:
                if part["file"] not in merged:
                    self._check_file(self.root / part["file"], part["sha256"])

    def _check_file(self, path: Path, digest: str) -> None:
        if not path.is_file() or sha256_of([path]) != digest:
            raise BadInput(
                f"{path} is not as the unfinished run left it; begin again with --restart."
            )

    def finish_step(
        self,
        parts: Iterable[Tensors],
        said: Callable[[], dict[str, Any]],
        state: Callable[[], Iterable[Tensors]],
    ) -> None:
        """Write what a step made, then what the next one needs, one dictionary at a time; then it
        counts, with what is said of it after that. Raises BadInput when the disk is full.
        """
        number = sum(len(step["parts"]) for step in self.steps)
        written: list[dict[str, Any]] = []
        for tensors in parts:
            path = self.root / f"part-{number + len(written):05d}"
            self.save(tensors, path)
            _to_disk(path)
            size = path.stat().st_size
            written.append({"file": path.name, "bytes": size, "sha256": sha256_of([path])})
        folder = self.root / f"state-{len(self.steps):05d}"
        digests: dict[str, str] = {}
        for index, tensors in enumerate(state()):
            with self._room():
                folder.mkdir(exist_ok=True)
            path = folder / f"{index:05d}"
            self.save(tensors, path)
            _to_disk(path)
            digests[f"{folder.name}/{path.name}"] = sha256_of([path])
        step = {**said(), "parts": written, "state": digests}
        self._write_manifest({**self._manifest, "steps": [*self.steps, step]})
        for left in self.root.glob("state-*"):
            if left != folder:
                shutil.rmtree(left)

    def save(self, tensors: Tensors, path: Path) -> None:
        """As safetensors. Raises BadInput when the disk is full."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with self._room():
            save_file(whole, path, {"format": "pt"})

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Raises BadInput where the disk has none."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            # safetensors has no error number, but the system's words.
            said = any(f"os error {number}" in str(error) for number in FULL)
            if not said and getattr(error, "errno", None) not in FULL:
                raise
            raise BadInput(
                f"The disk of {self._said} is full; make room there, and go on with --resume."
            ) from error

    def state(self) -> Iterator[Tensors]:
        """What the last finished step left for the next, as it was given."""
        for name in self.steps[-1]["state"]:
            yield load_file(self.root / name)

    def remembered(self, key: str) -> Any:
        """What `remember` was told, by this run or the one that it goes on from; else None."""
        return self._manifest.get("remembered", {}).get(key)

    def remember(self, key: str, value: Any) -> None:
        remembered = {**self._manifest.get("remembered", {}), key: value}
        self._write_manifest({**self._manifest, "remembered": remembered})

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        """What counts from now on."""
        fresh = self.root / f"{MANIFEST}.new"
        with self._room(), fresh.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self.root / MANIFEST)
        self._manifest = manifest

    def _shards(self) -> list[tuple[str, list[str]]]:
        sizes = {part["file"]: part["bytes"] for step in self.steps for part in step["parts"]}
        return shards_of(sizes, self._shard_bytes)

    def finish_weights(self) -> None:
        """Make shards of the parts, and an index where there are several. A run that is killed in
        here goes on from the shards that are whole.
        """
        for name, members in self._shards():
            shards: dict[str, str] = self._manifest["shards"]
            if name not in shards:
                fresh = self.root / f"{name}.new"
                with self._room():
                    merge([self.root / part for part in members], fresh)
                _to_disk(fresh)
                fresh.rename(self.folder / name)
                digest = sha256_of([self.folder / name])
                self._write_manifest({**self._manifest, "shards": {**shards, name: digest}})
            for part in members:
                (self.root / part).unlink(missing_ok=True)
        if len(self._shards()) > 1:
            self.write_json(INDEX, index_of([self.folder / name for name, _ in self._shards()]))

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False)
        with self._room():
            (self.folder / name).write_text(text + "\n", encoding="utf-8")

    def copy_side_files(self, source: Checkpoint) -> None:
        with self._room():
            for name in source.side_files():
                shutil.copyfile(source.folder / name, self.folder / name)

    def publish(self) -> None:
        """Make the folder visible under its name, in one rename, and forget the steps. Raises
        BadInput when something has come there meanwhile that may not be replaced.
        """
        self._check()
        if self._out.exists():
            # rename() replaces an empty folder only; the old checkpoint goes when the new one is
            # complete.
            self._out.rename(self._retired)
            try:
                self.folder.rename(self._out)
            except OSError:
                self._retired.rename(self._out)
                raise
            self._manifest = {}
            shutil.rmtree(self._retired, ignore_errors=True)
        else:
            self.folder.rename(self._out)
            self._manifest = {}


def _to_disk(path: Path) -> None:
    """What the manifest names must outlive a power cut, too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
