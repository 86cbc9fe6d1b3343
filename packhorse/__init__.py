"""`packhorse.serve` and `packhorse.quantize`.

In a checkout their folders stand beside this one, at the top, where people look for them; in an
installed wheel they stand in it. See docs/decisions/0011-one-import-package.md.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "serve").is_dir():
    __path__.append(str(_here.parent))
