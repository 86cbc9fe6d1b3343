"""The journal keeps whole lines alone, whenever it was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.serve.batches import journal as journals
from packhorse.serve.batches.journal import Journal


def lines_of(journal: Journal) -> list[bytes]:
    found: list[bytes] = []
    journal.read(found.append)
    return found


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = b'{"a": 1}\n{"b": "two"}\n{"c": 3}\n'
    path = tmp_path / "journal"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        journal = Journal(path)
        count = whole[:end].count(b"\n")
        assert lines_of(journal) == whole.splitlines(keepends=True)[:count]
        journal.write([b'{"d": 4}\n'])
        journal.close()
        assert path.read_bytes().endswith(b'{"d": 4}\n')
        assert path.read_bytes().count(b"\n") == count + 1


def test_a_torn_line_may_be_longer_than_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "PIECE_BYTES", 16)
    path = tmp_path / "journal"
    path.write_bytes(b"first\n" + b"x" * 100)
    journal = Journal(path)
    assert journal.size == 6
    journal.close()
    assert path.read_bytes() == b"first\n"


def test_what_the_disk_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write([b"one\n"])

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.write([b"two\n", b"three\n"])
    assert lines_of(journal) == [b"one\n"]
    journal.write([b"two\n"])
    assert lines_of(journal) == [b"one\n", b"two\n"]
    journal.close()


def test_a_repair_that_failed_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write([b"one\n"])

    def torn(file: int) -> None:  # the write has got so far, and cannot be taken back either
        with (tmp_path / "journal").open("ab") as half:
            half.write(b"tw")
        monkeypatch.setattr(journals.os, "ftruncate", refuse)
        raise OSError(5, "Input/output error")

    def refuse(file: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context():
        monkeypatch.setattr(journals.os, "fsync", torn)
        with pytest.raises(OSError, match="Input/output"):
            journal.write([b"two\n"])
    monkeypatch.undo()
    journal.write([b"three\n"])
    assert lines_of(journal) == [b"one\n", b"three\n"]
    journal.close()
