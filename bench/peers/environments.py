"""The other tools' own virtual environments: made once by pip, used again while the pins are these.

Their versions of transformers and compressed-tensors are not the project's, so they are never
installed beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PINS = {
    "llm-compressor": ("llmcompressor==0.14.0.1", "transformers==5.17.*"),
    "auto-round": ("auto-round==0.16.1", "transformers==5.19.*"),
}
# Not needed, and they fail to import beside another build of torch.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def python_of(tool: str, work_folder: Path) -> Path:
    """The interpreter that has `tool`; a name without pins is the project's own."""
    if tool not in PINS:
        return Path(sys.executable)
    folder = work_folder / "environments" / tool
    python = folder / "bin/python"
    marker = folder / "installed.json"
    wanted = json.dumps([TORCH, *PINS[tool]])
    if marker.is_file() and marker.read_text() == wanted:
        return python
    print(f"installing {tool}", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: a range would take a CUDA build of several GB.
    for command in (
        [*pip, "install", TORCH],
        [*pip, "install", TORCH, *PINS[tool]],
        [*pip, "uninstall", "--yes", *UNWANTED],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)
    marker.write_text(wanted)
    return python
