"""Files and batches on disk, by tenant: `<folder>/files/<id>.jsonl` is a file and `<id>.json` what
is known of it; `<folder>/batches/<id>.json` is a batch, `<id>.output` and `<id>.errors` its
journals, which become files when it ends. All survives restarts, and belongs to one server at a
time.

Its public methods run in the event loop and do what blocks in a thread. What a tenant does not have
is the same to it as what does not exist.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from packhorse.serve.batches.journal import sync_folder
from packhorse.serve.batches.records import (
    ENDED,
    BatchRecord,
    FileRecord,
    Owner,
    Purpose,
    Status,
)
from packhorse.serve.batches.run import Paths
from packhorse.serve.errors import (
    Conflict,
    Invalid,
    NotFound,
    Overloaded,
    StartupError,
    TooLarge,
    Unavailable,
)
from packhorse.serve.messages import Caller
from packhorse.serve.settings.batches import BatchSettings

logger = logging.getLogger("packhorse.batches")

Record = TypeVar("Record", FileRecord, BatchRecord)
WRITE_BYTES = 2**18
"""Uploads are handed to the disk in pieces of this size."""
KEPT_BATCHES = 1000
"""Batches of a tenant that have ended; the oldest beyond them are forgotten."""
MAX_UPLOADS = 8
"""Uploads of a tenant at once."""
RETRY_S = 5.0


class BatchStore:
    """The files and batches of one server."""

    def __init__(
        self, settings: BatchSettings, folder: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises StartupError when the folder cannot be used, or another server uses it."""
        self._settings = settings
        self._clock = clock
        self._folder = folder.resolve()
        self._files_in = self._folder / "files"
        self._batches_in = self._folder / "batches"
        self._uploads_in = self._folder / "uploads"
        try:
            for path in (self._files_in, self._batches_in, self._uploads_in):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (self._folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StartupError(
                f"{folder} holds the batches of another server that runs; set batches.folder to "
                "another folder."
            ) from error
        except OSError as error:
            raise StartupError(f"batches.folder {folder} cannot be used: {error}") from error
        # One thread, so that two states of a record are written in their order.
        self._disk = ThreadPoolExecutor(1, "batches")
        self._bytes: dict[str, int] = {}
        self._uploads: dict[str, int] = {}
        self._files: dict[str, FileRecord] = {}
        self._batches: dict[str, BatchRecord] = {}
        try:
            self._load()
        except OSError as error:
            self._lock.close()
            raise StartupError(f"batches.folder {folder} cannot be read: {error}") from error
        self.changed = asyncio.Event()
        """Set when a batch was made or is to be cancelled."""

    def _load(self) -> None:
        for left in self._uploads_in.iterdir():  # by a server that was killed
            left.unlink()
        for batch in _records(self._batches_in, BatchRecord):
            self._batches[batch.id] = batch
            for path in self.paths(batch)[1:]:
                with suppress(FileNotFoundError):
                    self.add_bytes(batch.owner.tenant, path.stat().st_size)
        for file in _records(self._files_in, FileRecord):
            if self.content_path(file.id).exists():
                self._files[file.id] = file
                self.add_bytes(file.tenant, file.bytes)
            else:
                self._record_path(file).unlink()
        # Content whose record was not written any more, or is removed already; except that of
        # batches which are being finalized.
        reserved = {
            name: batch.owner.tenant
            for batch in self._batches.values()
            if not batch.has_ended
            for name in (batch.output_id, batch.error_id)
        }
        for path in self._files_in.glob("*.jsonl"):
            if path.stem in self._files:
                continue
            if path.stem in reserved:
                self.add_bytes(reserved[path.stem], path.stat().st_size)
            else:
                path.unlink()

    async def close(self) -> None:
        """Write what is due, and release the folder for another server."""
        await asyncio.to_thread(self._disk.shutdown)
        self._lock.close()

    # -- files

    def begin_upload(self, caller: Caller) -> Upload:
        """Raises Overloaded, or Conflict when the tenant has as many files as it may."""
        tenant = caller.tenant
        if self._uploads.get(tenant, 0) >= MAX_UPLOADS:
            raise Overloaded(
                f"{MAX_UPLOADS} files of this tenant are being uploaded, the limit; wait until one "
                "is there.",
                retry_after_s=RETRY_S,
            )
        self._check_files(tenant, self._uploads.get(tenant, 0) + 1)
        return Upload(self, tenant, self._uploads_in / uuid.uuid4().hex, self._settings)

    def _check_files(self, tenant: str, more: int) -> None:
        """Raises Conflict when so many more are too many; batches that run will make two each."""
        limit = self._settings.max_files_per_tenant
        have = sum(file.tenant == tenant for file in self._files.values())
        due = 2 * len(self._unfinished(tenant))
        if have + due + more > limit:
            raise Conflict(
                f"This tenant has {have} files, and its unfinished batches will make {due}: with "
                f"{more} more it would be above the limit of {limit}; delete files."
            )

    def add_bytes(self, tenant: str, size: int) -> None:
        """Count bytes that a tenant keeps; negative ones are gone."""
        total = self._bytes.get(tenant, 0) + size
        if total > 0:
            self._bytes[tenant] = total
        else:
            self._bytes.pop(tenant, None)

    def has_room(self, tenant: str, size: int = 0) -> bool:
        """Whether the tenant may keep so many bytes more."""
        return self._bytes.get(tenant, 0) + size <= self._settings.max_bytes_per_tenant

    def file(self, caller: Caller, file_id: str) -> FileRecord:
        """Raises NotFound."""
        file = self._files.get(file_id)
        if file is None or file.tenant != caller.tenant:
            raise NotFound(f"There is no file {_shown(file_id)}.", param="file_id")
        return file

    def files(self, caller: Caller) -> list[FileRecord]:
        """The tenant's files, the newest first."""
        mine = [file for file in self._files.values() if file.tenant == caller.tenant]
        return sorted(mine, key=lambda file: (file.created_at, file.id), reverse=True)

    async def open_content(self, caller: Caller, file_id: str) -> BinaryIO:
        """The content, which can be read to its end though the file is deleted meanwhile. Raises
        NotFound.
        """
        file = self.file(caller, file_id)
        try:
            return await asyncio.to_thread(self.content_path(file.id).open, "rb")
        except FileNotFoundError:
            raise NotFound(f"There is no file {_shown(file_id)}.", param="file_id") from None

    async def delete_file(self, caller: Caller, file_id: str) -> None:
        """Raises NotFound, or Conflict while a batch reads it."""
        file = self.file(caller, file_id)
        for batch in self._unfinished(caller.tenant):
            if batch.input_file_id == file_id:
                raise Conflict(
                    f"{file_id} is the input of {batch.id}, which has not ended; cancel that "
                    "first, or wait.",
                    param="file_id",
                )
        await self._remove_file(file)

    async def _remove_file(self, file: FileRecord) -> None:
        if self._files.pop(file.id, None) is None:
            return  # somebody else has removed it meanwhile
        self.add_bytes(file.tenant, -file.bytes)
        await self._on_disk(_unlink, self._record_path(file), self.content_path(file.id))

    async def add_file(
        self,
        written: Path,
        tenant: str,
        *,
        file_id: str,
        filename: str,
        purpose: Purpose,
        ttl_s: int | None = None,
    ) -> FileRecord:
        """Make a file of a finished one, which is renamed; its bytes are counted already. Done
        again after a kill, it does what is left. Raises OSError.
        """
        content = self.content_path(file_id)

        def move() -> int:
            with suppress(FileNotFoundError):
                written.rename(content)
                sync_folder(self._files_in)
            return content.stat().st_size

        size = await self._on_disk(move)
        created = int(self._clock())
        expires = created + min(ttl_s or self._settings.ttl_s, self._settings.ttl_s)
        file = FileRecord(file_id, tenant, filename, purpose, size, created, expires)
        await self._on_disk(_write, self._record_path(file), msgspec.json.encode(file))
        self._files[file_id] = file
        return file

    def content_path(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self._files_in / f"{file_id}.jsonl"

    def _record_path(self, record: FileRecord | BatchRecord) -> Path:
        folder = self._files_in if isinstance(record, FileRecord) else self._batches_in
        return folder / f"{record.id}.json"

    # -- batches

    def _unfinished(self, tenant: str) -> list[BatchRecord]:
        return [
            batch
            for batch in self._batches.values()
            if batch.owner.tenant == tenant and not batch.has_ended
        ]

    async def create(
        self,
        caller: Caller,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        window_s: int,
        output_ttl_s: int | None = None,
        metadata: dict[str, str] | None = None,
    ) -> BatchRecord:
        """A new batch, which will run as this caller. Raises NotFound, Invalid, Conflict, or
        Overloaded when too many have not ended.
        """
        file = self.file(caller, input_file_id)
        if file.purpose != "batch":
            raise Invalid(
                f"{file.id} has the purpose {file.purpose}; upload the input with the purpose "
                "batch.",
                param="input_file_id",
            )
        limit = self._settings.max_unfinished_per_tenant
        if len(self._unfinished(caller.tenant)) >= limit:
            raise Overloaded(
                f"{limit} batches of this tenant have not ended, the limit; wait until one has, or "
                "cancel one.",
                retry_after_s=60,
            )
        self._check_files(caller.tenant, 2)
        if not self.has_room(caller.tenant):
            raise TooLarge(
                "This tenant's files are above the limit of "
                f"{self._settings.max_bytes_per_tenant} bytes; delete some."
            )
        now = int(self._clock())
        batch = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}",
            owner=Owner(caller.name, caller.tenant),
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + window_s,
            output_id=new_file_id(),
            error_id=new_file_id(),
            output_ttl_s=output_ttl_s,
            metadata=metadata,
        )
        self._batches[batch.id] = batch
        try:
            await self.save(batch)
        except OSError as error:
            del self._batches[batch.id]
            raise _not_kept(error) from error
        self.changed.set()
        return batch

    def batch(self, caller: Caller, batch_id: str) -> BatchRecord:
        """Raises NotFound."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.owner.tenant != caller.tenant:
            raise NotFound(f"There is no batch {_shown(batch_id)}.", param="batch_id")
        return batch

    def batches(self, caller: Caller) -> list[BatchRecord]:
        """The tenant's batches, the newest first."""
        mine = [each for each in self._batches.values() if each.owner.tenant == caller.tenant]
        return sorted(mine, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    async def cancel(self, caller: Caller, batch_id: str) -> BatchRecord:
        """Lines in flight are ended; answers that are there are kept. Raises NotFound, or Conflict
        when it has ended.
        """
        batch = self.batch(caller, batch_id)
        if batch.has_ended or batch.status == "finalizing":
            raise Conflict(
                f"{batch.id} is {batch.status}, and cannot be cancelled any more.", param="batch_id"
            )
        if batch.status != "cancelling":
            batch.status = "cancelling"
            batch.cancelling_at = int(self._clock())
            try:
                await self.save(batch)
            except OSError as error:
                raise _not_kept(error) from error
        self.changed.set()
        return batch

    def unfinished(self) -> list[BatchRecord]:
        """The batches of all tenants that have not ended, the oldest first."""
        found = [batch for batch in self._batches.values() if not batch.has_ended]
        return sorted(found, key=lambda batch: (batch.created_at, batch.id))

    def paths(self, batch: BatchRecord) -> Paths:
        """The files of its run."""
        stem = self._batches_in / batch.id
        return Paths(
            self.content_path(batch.input_file_id),
            stem.with_suffix(".output"),
            stem.with_suffix(".errors"),
        )

    async def save(self, batch: BatchRecord) -> None:
        """Write the state of a batch. Raises OSError."""
        await self._on_disk(_write, self._record_path(batch), msgspec.json.encode(batch))

    async def finalize(self, batch: BatchRecord, outcome: Status) -> None:
        """End a batch whose journals are closed: they become its files. Done again after a kill, it
        does what is left. Raises OSError.
        """
        assert outcome in ENDED
        if batch.outcome is None:
            batch.outcome = outcome
            if batch.status != "cancelling":
                batch.status = "finalizing"
            if outcome != "failed":
                batch.finalizing_at = int(self._clock())
            await self.save(batch)
        paths = self.paths(batch)
        for written, file_id, name in (
            (paths.output, batch.output_id, "output"),
            (paths.errors, batch.error_id, "error"),
        ):
            is_moved = self.content_path(file_id).exists()
            if not is_moved and (not written.exists() or not written.stat().st_size):
                await self._on_disk(_unlink, written)
                continue
            await self.add_file(
                written,
                batch.owner.tenant,
                file_id=file_id,
                filename=f"{batch.id}_{name}.jsonl",
                purpose="batch_output",
                ttl_s=batch.output_ttl_s,
            )
            setattr(batch, f"{name}_file_id", file_id)
        batch.status = batch.outcome
        setattr(batch, f"{batch.outcome}_at", int(self._clock()))
        await self.save(batch)

    async def sweep(self) -> None:
        """Delete what is too old: files, and batches that have ended. Raises OSError."""
        now = self._clock()
        for file in [file for file in self._files.values() if file.expires_at <= now]:
            # Looked at each time, because a batch may be created while another file is deleted.
            if all(batch.input_file_id != file.id for batch in self.unfinished()):
                await self._remove_file(file)
        kept: dict[str, int] = {}
        ended = [batch for batch in self._batches.values() if batch.has_ended]
        for batch in sorted(ended, key=lambda batch: batch.created_at, reverse=True):
            tenant = batch.owner.tenant
            kept[tenant] = kept.get(tenant, 0) + 1
            if batch.created_at + self._settings.ttl_s <= now or kept[tenant] > KEPT_BATCHES:
                del self._batches[batch.id]
                await self._on_disk(_unlink, self._record_path(batch))

    async def _on_disk(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)


class Upload:
    """A file that is being uploaded. `finish` or `abandon` it."""

    def __init__(self, store: BatchStore, tenant: str, path: Path, settings: BatchSettings) -> None:
        self._store, self._tenant, self._path = store, tenant, path
        self._settings = settings
        self._file: BinaryIO | None = None
        self._buffer = bytearray()
        self._writing: asyncio.Future[None] | None = None
        self._is_over = False
        self.size = 0
        store._uploads[tenant] = store._uploads.get(tenant, 0) + 1

    async def write(self, piece: bytes) -> None:
        """Raises TooLarge, or Unavailable when the disk is full."""
        limit = self._settings.max_file_bytes
        if self.size + len(piece) > limit:
            raise TooLarge(f"The file is above the limit of {limit} bytes; split it.")
        if not self._store.has_room(self._tenant, len(piece)):
            raise TooLarge(
                "With this file, the tenant's files are above the limit of "
                f"{self._settings.max_bytes_per_tenant} bytes; delete some."
            )
        self.size += len(piece)
        self._store.add_bytes(self._tenant, len(piece))
        self._buffer += piece
        if len(self._buffer) >= WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        piece, self._buffer = bytes(self._buffer), bytearray()
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, piece))
        try:
            await asyncio.shield(self._writing)
        except OSError as error:
            raise _not_kept(error) from error

    def _write(self, piece: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("xb")
        self._file.write(piece)

    async def finish(self, filename: str, ttl_s: int | None = None) -> FileRecord:
        """Keep the file. Raises Unavailable when the disk is full."""
        await self._flush()
        file, self._file = self._file, None
        assert file is not None

        def close() -> None:
            with file:
                file.flush()
                os.fsync(file.fileno())

        try:
            await asyncio.to_thread(close)
            record = await self._store.add_file(
                self._path,
                self._tenant,
                file_id=new_file_id(),
                filename=filename,
                purpose="batch",
                ttl_s=ttl_s,
            )
        except OSError as error:
            raise _not_kept(error) from error
        self._over()
        return record

    async def abandon(self) -> None:
        """Delete what has come, unless it is kept. Safe to call twice."""
        if self._is_over:
            return
        self._over()
        self._store.add_bytes(self._tenant, -self.size)
        if self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])
        file, self._file = self._file, None

        def remove() -> None:
            if file is not None:
                file.close()
            self._path.unlink(missing_ok=True)

        await asyncio.to_thread(remove)

    def _over(self) -> None:
        self._is_over = True
        left = self._store._uploads[self._tenant] - 1
        if left:
            self._store._uploads[self._tenant] = left
        else:
            del self._store._uploads[self._tenant]


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


def _shown(name: str) -> str:
    """An id that a client sent, for a message."""
    return repr(name[:80])


def _not_kept(error: OSError) -> Unavailable:
    return Unavailable(
        f"The server cannot keep it: {error.strerror}; try again later.", retry_after_s=30
    )


def _records(folder: Path, kind: type[Record]) -> Iterator[Record]:
    """The records in a folder. One that the disk has damaged is left there, with a warning."""
    for left in folder.glob("*.new"):
        left.unlink()
    for path in sorted(folder.glob("*.json")):
        try:
            yield msgspec.json.decode(path.read_bytes(), type=kind)
        except msgspec.MsgspecError as error:
            logger.warning("%s is damaged, and left out: %s", path, error)


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step that lasts."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    sync_folder(path.parent)


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
