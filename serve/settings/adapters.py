"""Settings of the adapters (adapters/), see docs/adapters.md."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from packhorse.serve.settings.section import Section


class AdapterSettings(Section):
    """Without `folder` and `store`, no adapters are served."""

    folder: Path | None = None
    """The watched folder: every subfolder that PEFT has saved is an adapter with that name."""
    store: Path | None = None
    """Holds the copies of the adapters and the registry over restarts. Unset: `.store` in `folder`.
    """
    allowed_roots: tuple[Path, ...] | None = None
    """Folders that adapters may be added from, with everything below them, besides `folder`. Unset:
    the Hub's cache.
    """
    max_registered: int = Field(1000, ge=1)
    max_concurrent_per_adapter: int | None = Field(None, ge=1)
    """Requests of one adapter in the engine; more wait. Unset: no limit."""
    max_waiting: int | None = Field(None, ge=1)
    """Requests of one adapter in the queue for the engine; more get 429. Unset: the engine's
    max_num_seqs.
    """
    quantum_tokens: int = Field(4096, ge=1)
    """The quantum of the deficit round robin over adapters: tokens that one adapter may use before
    another that waits for a slot of the engine gets it.
    """
    max_bytes: int = Field(4 * 2**30, ge=2**20)
    """Larger adapters are refused."""

    @field_validator("allowed_roots")
    @classmethod
    def _are_whole_paths(cls, roots: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
        expanded = None if roots is None else tuple(root.expanduser() for root in roots)
        for root in expanded or ():
            if not root.is_absolute():
                raise ValueError(f"{str(root)!r} is not absolute; give the folder's whole path")
        return expanded

    @property
    def store_folder(self) -> Path | None:
        """The store's folder; None: no adapters are served."""
        return self.store or (self.folder / ".store" if self.folder else None)
