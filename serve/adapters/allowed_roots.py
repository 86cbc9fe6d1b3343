"""The folders that adapters may be added from, as the operator has set them. The registry checks
every added adapter here, those of operators' calls and those of the watched folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from packhorse.serve.adapters.folders import Source
from packhorse.serve.errors import Invalid


def hub_cache() -> Path:
    """The folder of huggingface_hub's downloads, by its own rules (HF_HUB_CACHE, HF_HOME, ...)."""
    from huggingface_hub import constants  # takes a moment to import

    return Path(constants.HF_HUB_CACHE)


class AllowedRoots:
    """Folders, each with everything below it. They need not exist yet."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def source(self, path: Path) -> Source:
        """The folder that `path` leads to, with the root that it lies in (the outermost, if there
        are several): links in the folder may lead anywhere within that root. Blocking.

        Raises Invalid, with the same message whether `path` exists or not.
        """
        if ".." in path.parts:  # its meaning depends on whether the parts before it exist
            raise Invalid(
                f"path={str(path)[:200]!r} has '..' in it; give the folder's path without.",
                param="path",
            )
        try:
            real = Path(os.path.realpath(path))
        except ValueError as error:  # a NUL, or a name that cannot be encoded
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
