"""Which patches of vLLM fit a version: `python tools/probe_vllm.py [FOLDER]`.

FOLDER has `vllm/` in it, an unpacked wheel for instance; without it, the installed vLLM is looked
at. Prints each patch, and every expectation of it that does not hold, with the hash that the
source has now. Exits with 1 when there is one. See docs/vllm-upgrade.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packhorse.serve.engines.vllm.patches import PATCHES, probing


def main(root: Path | None) -> int:
    unfit = 0
    for patch in PATCHES.values():
        found = list(probing.mismatches(patch.applies_to, root))
        unfit += bool(found)
        state = "does not fit" if found else "fits"
        print(f"{patch.name} ({patch.kind}): {state}")
        for line in found:
            print(f"    {line}")
    print(f"{len(PATCHES) - unfit} of {len(PATCHES)} fit")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
