"""Install Packhorse and all it needs into the Python that runs this file; called by `make setup`.

    python tools/setup_env.py [--runtime]

Chooses the CPU or the CUDA build of vLLM by looking for an NVIDIA driver (PACKHORSE_BUILD=cpu|cuda
overrides), tries plain pip first and uv with PyTorch's CPU index where pip knows no CPU torch,
removes the torchvision family, and proves the result by importing it. A stamp of pyproject.toml
makes the second run quick. --runtime is for images: what serving needs, no development tools, and
not the checkout itself. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(sys.prefix) / ".packhorse-setup"
# Pulled in by vLLM's wheel as CUDA-linked builds; beside a CPU torch they break `import
# transformers`.
# Serving text needs none of them.
HARMFUL = ["torchvision", "torchaudio", "torchcodec"]
PROOF = (
    "import torch, transformers, vllm; "
    "from transformers import LlamaConfig; from vllm import AsyncEngineArgs"
)


def build() -> str:
    """`cuda` where an NVIDIA driver answers, else `cpu`."""
    chosen = os.environ.get("PACKHORSE_BUILD", "")
    if chosen:
        if chosen not in {"cpu", "cuda"}:
            sys.exit(
                f"PACKHORSE_BUILD={chosen} is neither cpu nor cuda; set one of them or unset it."
            )
        return chosen
    smi = shutil.which("nvidia-smi")
    return (
        "cuda"
        if smi and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0
        else "cpu"
    )


def stamp(extra: str) -> str:
    """What the installation depends on: change it and set-up runs again."""
    text = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(text + f"{extra} {sys.version} {ROOT}".encode()).hexdigest()


def run(*command: str) -> bool:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def install(extra: str, *, runtime: bool) -> bool:
    target = [f"{ROOT}[{extra}]"] if runtime else ["--editable", f"{ROOT}[{extra},dev]"]
    pip = [sys.executable, "-m", "pip"]
    if run(*pip, "install", *target):
        return True
    print(
        "pip could not do it (often because PyPI has no CPU build of torch); "
        "trying uv, which knows PyTorch's own index."
    )
    return run(*pip, "install", "--quiet", "uv") and run(
        sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend",
        "cpu" if extra == "cpu" else "auto", *target,
    )  # fmt: skip


def check_version() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: Packhorse needs 3.11 or newer. "
            "Name one: make setup PYTHON=python3.12"
        )


def main() -> None:
    check_version()
    if "--check-version" in sys.argv:
        return
    if sys.prefix == sys.base_prefix:
        sys.exit("This Python is not a virtual environment; run `make setup`, which makes one.")
    extra = build()
    runtime = "--runtime" in sys.argv
    wanted = stamp(f"{extra}, runtime" if runtime else extra)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(
        f"Setting up the {extra} build in {sys.prefix}; "
        "the first time takes some minutes and about 4 GB.",
        flush=True,
    )
    if importlib.util.find_spec("pip") is None:  # environments made by uv have none
        run(sys.executable, "-m", "ensurepip")
    if not install(extra, runtime=runtime):
        sys.exit("The installation failed; the reason is above.")
    unwanted = [*(HARMFUL if extra == "cpu" else []), *(["uv"] if runtime else [])]
    if unwanted:
        run(sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted)
    # Not from the checkout, so that what is proved is what was installed.
    proof = subprocess.run(
        [sys.executable, "-c", PROOF], cwd=sys.prefix, capture_output=True, text=True, check=False
    )
    if proof.returncode:
        sys.exit(
            f"transformers or vllm does not import after the installation:\n{proof.stderr[-2000:]}"
        )
    STAMP.write_text(wanted)
    print("Set up.")


if __name__ == "__main__":
    main()
