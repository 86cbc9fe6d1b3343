"""Activations between two uses: in memory up to a limit, in files beyond it.

runner.py stores hidden states here, and the inputs of the current block's layers.
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


class ActivationStore:
    """Tensors by key. They are kept in host memory or files, and returned on the device that they
    came from.
    """

    def __init__(
        self, limit_bytes: int | None = None, folder: Path | None = None, save: Save = save_file
    ) -> None:
        """`limit_bytes` is for tensors in memory; None means no limit. `folder` is created with its
        first file. Raises ValueError for a limit without a folder.
        """
        if limit_bytes is not None and folder is None:
            raise ValueError("a limit needs a folder for the tensors above it")
        self._limit_bytes = limit_bytes
        self._folder = folder
        self._save = save
        self._numbers = count()
        self._held: dict[Key, tuple[Tensor | Path, torch.device]] = {}
        self.bytes_in_memory = 0
        """Bytes of the tensors that are in memory."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Store a tensor, in place of the key's earlier one."""
        self.drop(*key)
        size = tensor.nbytes
        if self._limit_bytes is None or self.bytes_in_memory + size <= self._limit_bytes:
            self._held[key] = (tensor.cpu(), tensor.device)
            self.bytes_in_memory += size
            return
        assert self._folder is not None
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{next(self._numbers):06d}"
        self._save({"tensor": tensor.cpu()}, path)
        self._held[key] = (path, tensor.device)

    def get(self, key: Key) -> Tensor:
        """The tensor, which must not be changed in place. Raises KeyError."""
        held, device = self._held[key]
        if isinstance(held, Path):
            # A copy: in a file the tensor may have another alignment, and matrix products over it
            # sum in another order.
            held = load_file(held)["tensor"].clone()
        return held.to(device)

    def drop(self, *start: str | int) -> None:
        """Delete all tensors whose keys start with `start`."""
        for key in [key for key in self._held if key[: len(start)] == start]:
            held, _ = self._held.pop(key)
            if isinstance(held, Path):
                held.unlink()
            else:
                self.bytes_in_memory -= held.nbytes
