"""Files and batches on disk: what a kill leaves, what is deleted, who owns the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.serve.batches import store as stores
from packhorse.serve.batches.records import BatchRecord, FileRecord
from packhorse.serve.batches.store import BatchStore
from packhorse.serve.errors import NotFound, StartupError
from packhorse.serve.messages import ANONYMOUS, Caller
from packhorse.serve.settings.batches import BatchSettings

OTHER = Caller("other", "other", frozenset({"inference"}))
DAY_S = 24 * 3600


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def opened(folder: Path, clock: Clock | None = None) -> BatchStore:
    return BatchStore(BatchSettings(folder=folder), folder, clock=clock or Clock())


async def uploaded(store: BatchStore, content: bytes = b"{}\n") -> str:
    upload = store.begin_upload(ANONYMOUS)
    await upload.write(content)
    record = await upload.finish("in.jsonl")
    await upload.abandon()  # as a `finally` does; it is kept
    return record.id


async def created(store: BatchStore) -> BatchRecord:
    return await store.create(
        ANONYMOUS,
        input_file_id=await uploaded(store),
        endpoint="/v1/completions",
        completion_window="24h",
        window_s=DAY_S,
        metadata={"a": "b"},
    )


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    batch = await created(store)
    file = store.file(ANONYMOUS, batch.input_file_id)
    await store.close()
    again = opened(tmp_path)
    assert again.file(ANONYMOUS, file.id) == file
    assert again.batch(ANONYMOUS, batch.id) == batch
    with pytest.raises(NotFound):
        again.batch(OTHER, batch.id)
    assert again._bytes == {"anonymous": 3}
    await again.close()


async def test_a_folder_belongs_to_one_server(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(StartupError, match=r"batches\.folder"):
        opened(tmp_path)
    await store.close()
    await opened(tmp_path).close()


@pytest.mark.parametrize("killed_after", ["nothing", "rename", "record", "everything"])
async def test_a_kill_while_a_batch_ends_changes_nothing(tmp_path: Path, killed_after: str) -> None:
    """Whichever of the steps was the last one: the next server does what is left."""
    store = opened(tmp_path)
    batch = await created(store)
    paths = store.paths(batch)
    paths.output.write_bytes(b"answers\n")
    paths.errors.write_bytes(b"")
    batch.status, batch.outcome = "finalizing", "completed"
    await store.save(batch)
    content = store.content_path(batch.output_id)
    if killed_after in ("rename", "record"):
        paths.output.rename(content)
    if killed_after == "record":
        await store.add_file(
            paths.output, "anonymous", file_id=batch.output_id, filename="x", purpose="batch_output"
        )
    if killed_after == "everything":
        await store.finalize(batch, "completed")
    await store.close()
    again = opened(tmp_path)
    (left,) = again.unfinished() or [again.batch(ANONYMOUS, batch.id)]
    if not left.has_ended:
        await again.finalize(left, "completed")
    assert left.status == "completed"
    assert left.output_file_id == batch.output_id
    assert left.error_file_id is None
    with await again.open_content(ANONYMOUS, batch.output_id) as answers:
        assert answers.read() == b"answers\n"
    assert {path.suffix for path in (tmp_path / "batches").iterdir()} == {".json"}
    await again.close()


async def test_what_has_no_record_is_deleted_at_the_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = await uploaded(store)
    await store.close()
    (tmp_path / "files/file-orphan.jsonl").write_bytes(b"{}")
    (tmp_path / "uploads/half").write_bytes(b"{")
    (tmp_path / "files/file-half.new").write_bytes(b"{")
    (tmp_path / "files/file-damaged.json").write_bytes(b"{")
    again = opened(tmp_path)
    assert [file.id for file in again.files(ANONYMOUS)] == [kept]
    assert not list((tmp_path / "uploads").iterdir())
    assert not (tmp_path / "files/file-orphan.jsonl").exists()
    await again.close()


async def test_what_is_old_is_deleted_but_not_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "KEPT_BATCHES", 2)
    clock = Clock()
    store = opened(tmp_path, clock)
    running = await created(store)
    ended = [await created(store) for _ in range(3)]
    for batch in ended:
        clock.now_s += 1
        batch.created_at += 1 + ended.index(batch)
        await store.finalize(batch, "completed")
    await store.sweep()
    assert len(store.batches(ANONYMOUS)) == 3
    clock.now_s += 31 * DAY_S
    await store.sweep()
    assert [batch.id for batch in store.batches(ANONYMOUS)] == [running.id]
    assert [file.id for file in store.files(ANONYMOUS)] == [running.input_file_id]
    await store.close()


async def test_a_batch_may_be_created_while_old_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    first, second = await uploaded(store), await uploaded(store)
    clock.now_s += 31 * DAY_S
    removed = store._remove_file
    batches = []

    async def remove(file: FileRecord) -> None:
        if not batches:
            left = second if file.id == first else first
            batches.append(
                await store.create(
                    ANONYMOUS,
                    input_file_id=left,
                    endpoint="/v1/completions",
                    completion_window="24h",
                    window_s=DAY_S,
                )
            )
        await removed(file)

    monkeypatch.setattr(store, "_remove_file", remove)
    await store.sweep()
    assert [file.id for file in store.files(ANONYMOUS)] == [batches[0].input_file_id]
    await store.close()


async def test_an_upload_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    upload = store.begin_upload(ANONYMOUS)
    await upload.write(b"x" * 1_000_000)
    assert store._bytes == {"anonymous": 1_000_000}
    await upload.abandon()
    await upload.abandon()
    assert store._bytes == {}
    assert store._uploads == {}
    assert not list((tmp_path / "uploads").iterdir())
    await store.close()
