"""A run's files on disk: its finished steps, from which a killed run can be resumed, and the
result, which is published under its name in one rename.

During a run, the folder `.<out>.partial` is beside `out`:

lock            held by the run that writes here
manifest.json   the run's identity and its finished steps; replaced by a rename
part-00007      tensors that a step made, safetensors
state-00007     a folder: the state that the next step starts from (hidden states)
offload         a folder: activations beyond the memory limit (calibration/activation_store.py)
checkpoint      a folder, which becomes `out`

A step is finished once the manifest has it, with the sha256 of all its files. Called by run.py.
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import INDEX, Checkpoint, sha256_of
from packhorse.quantize.output.shards import index_of, merge, shards_of

SHARD_BYTES = 4 * 1024**3
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
Tensors = dict[str, Tensor]


class Workspace:
    """A context manager. On an error, finished steps stay on disk, and all else is removed."""

    def __init__(
        self,
        out: Path,
        source: Path,
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Take the lock, and remove what no finished step needs.

        Raises BadInput when `out` must not be created or replaced (it is the source, a folder that
        holds the source, or not a checkpoint), when another run is making it, or when its disk has
        less than `needed_bytes` free.
        """
        self._out = out.expanduser().resolve()
        self._name = out
        self._shard_bytes = shard_bytes
        self._source = source.resolve()
        self._overwrite = overwrite
        self._check()
        self.root = self._out.parent / f".{self._out.name}.partial"
        self.folder = self.root / "checkpoint"
        self.offload_folder = self.root / "offload"
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
        out, overwrite = self._name, self._overwrite
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
        """The system releases the lock when the process ends, in any way."""
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
                    f"Another run (process {owner}) is making {self._name}; wait for it, or choose "
                    "another --out."
                ) from error
            # A run that ended in between has removed the folder, and this lock's file with it.
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
                self._retired.rename(self._out)  # the run was killed between publish's renames
                self._check_again()

    def _check_again(self) -> None:
        """`_check`, for a folder that was restored after the first check."""
        try:
            self._check()
        except BadInput:
            self.close()
            raise

    def _sweep(self) -> None:
        """Remove the files that no finished step needs."""
        if self._is_resumable and not self.folder.exists():
            self._manifest = {}  # the run was killed just after publishing
        named = {"lock", MANIFEST, self.folder.name}
        named |= {part["file"] for step in self.steps for part in step["parts"]}
        named |= {name.split("/")[0] for step in self.steps[-1:] for name in step["state"]}
        if not self._is_resumable:
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
                f"{self._name} needs {needed_bytes:,} bytes of disk (what it replaces goes last), "
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
        if error is not None and self._has_begun and self._is_resumable:
            error.add_note(
                f"{len(self.steps)} finished steps are kept: the same command with --resume goes "
                "on from there, with --restart it begins again."
            )
        self.close()

    def close(self) -> None:
        """Release the lock; remove the folder when there is nothing to resume."""
        shutil.rmtree(self.offload_folder, ignore_errors=True)
        if not self._is_resumable:
            shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def _read(self) -> dict[str, Any]:
        path = self.root / MANIFEST
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:  # no kill can damage it, as it is replaced by a rename
            raise BadInput(f"{path} is damaged ({error}); remove {self.root}.") from error
        return found

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The summaries of the finished steps, with the digests of their files."""
        found: list[dict[str, Any]] = self._manifest.get("steps", [])
        return found

    @property
    def _is_resumable(self) -> bool:
        return bool(self.steps or self._manifest.get("remembered"))

    def begin(self, run: dict[str, Any], *, resume: bool, restart: bool) -> bool:
        """Start or resume the run with the identity `run`, which has everything that the bytes of
        the result depend on. Returns whether the run is resumed. Raises BadInput when there are
        finished steps and neither `resume` nor `restart`, or when they have another identity.
        """
        if self._is_resumable and not restart:
            if not resume:
                raise BadInput(
                    f"{self._name}: an earlier run was cut short after {len(self.steps)} steps; go "
                    "on from there with --resume, or begin again with --restart."
                )
            earlier = self._manifest["run"]
            if other := [key for key in {**run, **earlier} if run.get(key) != earlier.get(key)]:
                differences = "; ".join(
                    f"{key}: {earlier.get(key)} then, {run.get(key)} now" for key in other
                )
                raise BadInput(
                    f"{self._name}: the unfinished run cannot be gone on with, as it was another "
                    f"({differences}). Repeat it as it was, or begin again with --restart."
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
        summary: Callable[[], dict[str, Any]],
        state: Callable[[], Iterable[Tensors]],
    ) -> None:
        """Write a step's tensors and then its state, one dictionary at a time, and then the
        manifest with the step's summary. Raises BadInput when the disk is full.
        """
        number = sum(len(step["parts"]) for step in self.steps)
        written: list[dict[str, Any]] = []
        for tensors in parts:
            path = self.root / f"part-{number + len(written):05d}"
            self.save(tensors, path)
            _sync(path)
            size = path.stat().st_size
            written.append({"file": path.name, "bytes": size, "sha256": sha256_of([path])})
        folder = self.root / f"state-{len(self.steps):05d}"
        digests: dict[str, str] = {}
        for index, tensors in enumerate(state()):
            with self._disk_full_errors():
                folder.mkdir(exist_ok=True)
            path = folder / f"{index:05d}"
            self.save(tensors, path)
            _sync(path)
            digests[f"{folder.name}/{path.name}"] = sha256_of([path])
        step = {**summary(), "parts": written, "state": digests}
        self._write_manifest({**self._manifest, "steps": [*self.steps, step]})
        for left in self.root.glob("state-*"):
            if left != folder:
                shutil.rmtree(left)

    def save(self, tensors: Tensors, path: Path) -> None:
        """Write a safetensors file. Raises BadInput when the disk is full."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with self._disk_full_errors():
            save_file(whole, path, {"format": "pt"})

    @contextmanager
    def _disk_full_errors(self) -> Iterator[None]:
        """Raises BadInput for errors that mean that the disk is full."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            # An error of safetensors has the system's message, and no error number.
            is_full = any(f"os error {number}" in str(error) for number in FULL)
            if not is_full and getattr(error, "errno", None) not in FULL:
                raise
            raise BadInput(
                f"The disk of {self._name} is full; make room there, and go on with --resume."
            ) from error

    def state(self) -> Iterator[Tensors]:
        """The state of the last finished step."""
        for name in self.steps[-1]["state"]:
            yield load_file(self.root / name)

    def saved_value(self, key: str) -> Any:
        """The value that `save_value` stored in this run or in the run that it resumes; None when
        there is none.
        """
        return self._manifest.get("remembered", {}).get(key)

    def save_value(self, key: str, value: Any) -> None:
        """Keep a result that is not a step, as JSON in the manifest."""
        values = {**self._manifest.get("remembered", {}), key: value}
        self._write_manifest({**self._manifest, "remembered": values})

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        fresh = self.root / f"{MANIFEST}.new"
        with self._disk_full_errors(), fresh.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self.root / MANIFEST)
        self._manifest = manifest

    def _shards(self) -> list[tuple[str, list[str]]]:
        sizes = {part["file"]: part["bytes"] for step in self.steps for part in step["parts"]}
        return shards_of(sizes, self._shard_bytes)

    def finish_weights(self) -> None:
        """Merge the parts into shards, and write an index if there are several. A run that is
        killed here resumes after the finished shards.
        """
        for name, members in self._shards():
            shards: dict[str, str] = self._manifest["shards"]
            if name not in shards:
                fresh = self.root / f"{name}.new"
                with self._disk_full_errors():
                    merge([self.root / part for part in members], fresh)
                _sync(fresh)
                fresh.rename(self.folder / name)
                digest = sha256_of([self.folder / name])
                self._write_manifest({**self._manifest, "shards": {**shards, name: digest}})
            for part in members:
                (self.root / part).unlink(missing_ok=True)
        if len(self._shards()) > 1:
            self.write_json(INDEX, index_of([self.folder / name for name, _ in self._shards()]))

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False)
        with self._disk_full_errors():
            (self.folder / name).write_text(text + "\n", encoding="utf-8")

    def copy_side_files(self, source: Checkpoint) -> None:
        with self._disk_full_errors():
            for name in source.side_files():
                shutil.copyfile(source.folder / name, self.folder / name)

    def publish(self) -> None:
        """Move the result to `out` in one rename, and drop the steps. Raises BadInput when
        something has appeared at `out` that must not be replaced.
        """
        self._check()
        if self._out.exists():
            # rename() replaces only an empty folder, so the old checkpoint is renamed first, and
            # removed once the new one is in place.
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


def _sync(path: Path) -> None:
    """Flush a file to the disk: files that the manifest names must survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
