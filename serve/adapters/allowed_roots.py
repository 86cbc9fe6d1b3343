"""Where adapters may come from: the folders that the operator has allowed, and nowhere else. Called
by the registry, for operators' calls and for the watched folder alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from packhorse.serve.adapters.folders import Source
from packhorse.serve.errors import Invalid


def hub_cache() -> Path:
    """Where huggingface_hub downloads to, by its own rules (HF_HUB_CACHE, HF_HOME, ...)."""
    from huggingface_hub import constants  # takes a moment to import

    return Path(constants.HF_HUB_CACHE)


class Roots:
    """Folders with all that is below them. They need not be there yet."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def source(self, path: Path) -> Source:
        """What `path` leads to, and the root that it lies in, which links of it may lead to as
        well: the widest, if there are several. Blocking.

        Raises Invalid, which says the same whether there is anything at `path` or not.
        """
        if ".." in path.parts:  # whether what is before it is there would decide the answer
            raise Invalid(
                f"path={str(path)[:200]!r} has '..' in it; give the folder's path without.",
                param="path",
            )
        try:
            real = Path(os.path.realpath(path))
        except ValueError as error:  # a NUL, or what no name can be encoded from
            raise self._refusal(path) from error
        roots = sorted({Path(os.path.realpath(folder)) for folder in self._folders})
        for root in roots:  # the shortest of those that contain it comes first
            if real.is_relative_to(root):
                return Source(real, root)
        raise self._refusal(path)

    def _refusal(self, path: Path) -> Invalid:
        allowed = ", ".join(map(str, self._folders)) or "none"
        return Invalid(
            f"path={str(path)[:200]!r} is in no folder that adapters may come from "
            f"(adapters.allowed_roots: {allowed}); copy it into one, or add its folder to that "
            "setting.",
            param="path",
        )
