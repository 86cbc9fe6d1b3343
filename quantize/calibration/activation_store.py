"""Where tensors wait until they are needed again: in memory up to a limit, beyond it in files.

Filled and emptied by `blocks`: hidden states, and what layers of the block at hand are given.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Key = tuple[str | int, ...]
Save = Callable[[dict[str, Tensor], Path], None]


class Shelf:
    """Tensors by key. They wait in the host's memory and come back on the device that they left."""

    def __init__(
        self, limit_bytes: int | None = None, folder: Path | None = None, save: Save = save_file
    ) -> None:
        """`folder` is made when the first file is; `limit_bytes` None: all stay in memory."""
        if limit_bytes is not None and folder is None:
            raise ValueError("a limit needs a folder for what is above it")
        self._limit_bytes = limit_bytes
        self._folder = folder
        self._save = save
        self._numbers = count()
        self._held: dict[Key, tuple[Tensor | Path, torch.device]] = {}
        self.held_bytes = 0
        """In memory."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """In place of what the key had."""
        self.drop(*key)
        size = tensor.nbytes
        if self._limit_bytes is None or self.held_bytes + size <= self._limit_bytes:
            self._held[key] = (tensor.cpu(), tensor.device)
            self.held_bytes += size
            return
        assert self._folder is not None
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{next(self._numbers):06d}"
        self._save({"tensor": tensor.cpu()}, path)
        self._held[key] = (path, tensor.device)

    def get(self, key: Key) -> Tensor:
        """Not to be changed in place. Raises KeyError."""
        held, device = self._held[key]
        if isinstance(held, Path):
            # A copy: in a file it may lie on other boundaries, where products sum differently.
            held = load_file(held)["tensor"].clone()
        return held.to(device)

    def drop(self, *start: str | int) -> None:
        """Forget all whose keys start like this."""
        for key in [key for key in self._held if key[: len(start)] == start]:
            held, _ = self._held.pop(key)
            if isinstance(held, Path):
                held.unlink()
            else:
                self.held_bytes -= held.nbytes
