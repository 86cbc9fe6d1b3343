"""Makes the environments of client libraries and agents in out/clients, from tests/clients/pins.

    python tools/setup_clients.py

Two of Python, `new` and `old`, since some libraries want openai 3 and others openai 2; and one of
Node, whose interpreter comes with `new` from the package index, as an embedding model does. 2 GB,
two to three minutes; quick when nothing has changed. What cannot be made is told and left out: the
tests of it are skipped. Of the system it names java, curl and wget where they are missing. Called
by `make clients`; standard library only.

Two coding agents are among the packages of Node. Scripts of packages do not run, so opencode is the
package of its program, for x86-64 alone, and not `opencode-ai`, whose script would choose one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests/clients/pins"
MADE = ROOT / "out/clients"
SYSTEM = {"java": "default-jdk-headless", "curl": "curl", "wget": "wget"}
"""Programs, and Debian's packages of them."""


def stamp_of(*pins: Path) -> str:
    """What an environment depends on: change it and it is made again."""
    text = b"".join(pin.read_bytes() for pin in pins) + f"{sys.version} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def run(*command: str | Path, cwd: Path = ROOT, path: str = "") -> bool:
    print("+", *command, flush=True)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else None
    words = [str(word) for word in command]
    return subprocess.run(words, check=False, cwd=cwd, env=environment).returncode == 0


def make_python(name: str) -> bool:
    folder, pins = MADE / name, PINS / f"{name}.txt"
    if _is_made(folder, pins):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps"]
    made = run(sys.executable, "-m", "venv", folder) and run(*install, "--requirement", pins)
    return _stamped(folder, made, pins)


def make_node() -> bool:
    folder, bin_folder = MADE / "node", MADE / "new/bin"
    pins = (PINS / "package.json", PINS / "package-lock.json")
    if _is_made(folder, *pins):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pin in pins:
        shutil.copy(pin, folder)
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    made = run(bin_folder / "npm", "ci", *flags, cwd=folder, path=str(bin_folder))
    return _stamped(folder, made, *pins)


def _is_made(folder: Path, *pins: Path) -> bool:
    stamp = folder / ".stamp"
    return stamp.exists() and stamp.read_text() == stamp_of(*pins)


def _stamped(folder: Path, made: bool, *pins: Path) -> bool:
    if made:
        (folder / ".stamp").write_text(stamp_of(*pins))
    else:  # half of an environment would be taken for a whole one
        shutil.rmtree(folder, ignore_errors=True)
    return made


def main() -> None:
    new = make_python("new")
    made = {"new": new, "old": make_python("old"), "node": new and make_node()}
    for name in [name for name, well in made.items() if not well]:
        print(f"out/clients/{name} could not be made, see above; tests of its clients are skipped.")
    for name, package in SYSTEM.items():
        if shutil.which(name) is None:
            print(f"There is no {name} here (Debian: apt-get install {package}).")
    sys.exit(0 if any(made.values()) else "No client could be installed; the reason is above.")


if __name__ == "__main__":
    main()
