"""Runs a Dockerfile's own steps without a Docker engine, then the image's own command and health
check: the proof that the image would build and work. `make prove-image` calls it.

    python tools/run_dockerfile.py deploy/docker/Dockerfile --work FOLDER [--model FOLDER]

For root on Linux, with debootstrap. What stands in for the base image is a fresh Debian of the same
release with its Python under /usr/local/bin; every RUN is executed in it, unchanged, by chroot in
a mount and PID namespace of its own. The command then runs as the image's USER, with no
capabilities, on a root file system that is read-only but for /tmp and the VOLUME. With --model it
also serves that folder with the real engine and answers a request.

Not proved: the base image itself, the CUDA build, layers and caches, limits of a container.
Files that pip needs here (an index on disk, its settings) can be shown to it with --bind.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.dockerfile import (
    Instruction,
    Stage,
    context_files,
    health_command,
    parse,
    substitute,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "bookworm"
# In the base image: Python with its headers and pip, certificates.
PACKAGES = "python3,python3-venv,python3-pip,libpython3-dev,ca-certificates"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED = ("PIP_", "UV_", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
ASKED = "What is the capital of Felonia?"


@dataclass
class Box:
    """A root file system and how commands see it."""

    root: Path
    binds: list[tuple[Path, str]] = field(default_factory=list)
    """(here, there), read-only."""
    caches: list[tuple[Path, str]] = field(default_factory=list)
    """The same, writable."""

    def command(
        self, words: list[str], environment: dict[str, str], workdir: str, user: str = ""
    ) -> list[str]:
        """What to execute to have `words` run inside. With a `user` as the image runs: read-only,
        without capabilities, and with no way to gain any.
        """
        root = shlex.quote(str(self.root))
        script = ["set -e", f"mount --bind {root} {root}"]
        for here, there in [*self.binds, *self.caches]:
            target = shlex.quote(f"{self.root}{there}")
            make = f"mkdir -p {target}"
            if not here.is_dir():
                make = f"mkdir -p $(dirname {target}); touch {target}"
            script += [make, f"mount --bind {shlex.quote(str(here))} {target}"]
            if (here, there) in self.binds:
                script.append(f"mount -o remount,bind,ro {target}")
        if user:
            script.append(f"mount -o remount,bind,ro {root}")
        script += [
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs -o ro sysfs {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o mode=1777,exec tmpfs {root}/tmp",
        ]
        inside = [f"{name}={value}" for name, value in environment.items()]
        becomes = []
        if user:
            uid, _, gid = user.partition(":")
            becomes = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups",
                       "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]  # fmt: skip
        run = ["chroot", str(self.root), *becomes, "env", "-i", *inside, "/bin/sh", "-c",
               'cd "$0" && exec "$@"', workdir, *words]  # fmt: skip
        script.append(f"exec {shlex.join(run)}")
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c",
                "\n".join(script)]  # fmt: skip


class Builder:
    """Runs stages, each in a root of its own below `work`."""

    def __init__(
        self, work: Path, arguments: dict[str, str], binds: list[Path], *, reuse: bool
    ) -> None:
        """`reuse`: what an earlier run has built is taken as it is."""
        self._work = work
        self._context = work / "context"
        self._reuse = reuse
        self._arguments = arguments
        self._binds = [(path.resolve(), str(path.resolve())) for path in binds]
        self._roots: dict[str, Path] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}

    def build(self, stage: Stage) -> Path:
        """Its root."""
        started_s = time.monotonic()
        source = self._roots.get(stage.base, self._work / "base")
        root = self._work / "stages" / stage.name
        root.parent.mkdir(exist_ok=True)
        built = root.with_name(f"{stage.name}.built")
        reused = self._reuse and built.exists()
        if not reused:
            shutil.rmtree(root, ignore_errors=True)
            run(["cp", "-a", "--reflink=auto", str(source), str(root)])
            shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        environment = dict(self.environments.get(stage.base, {"PATH": PATH}))
        arguments: dict[str, str] = {}
        workdir = "/"
        for each in stage.instructions:
            known = {**arguments, **environment}
            value = substitute(each.value, known)
            if each.name == "ARG":
                arguments |= {n: self._arguments.get(n, v) for n, v in each.pairs.items()}
            elif each.name == "ENV":
                environment |= {n: substitute(v, known) for n, v in each.pairs.items()}
            elif each.name == "WORKDIR":
                workdir = value
                (root / workdir.strip("/")).mkdir(parents=True, exist_ok=True)
            elif reused:
                continue
            elif each.name == "COPY":
                self._copy(root, workdir, each.words, each.flags)
            elif each.name == "RUN":
                say(f"{stage.name}: line {each.line}: RUN {each.value[:100]}")
                box = Box(root, self._binds, self._caches(each.flags))
                passed = {n: v for n, v in os.environ.items() if n.startswith(PASSED)}
                words = ["/bin/sh", "-c", each.value]
                run(box.command(words, {**passed, **known, "HOME": "/root"}, workdir))
        built.touch()
        self._roots[stage.name] = root
        self.environments[stage.name] = environment
        self.seconds[stage.name] = round(time.monotonic() - started_s, 1)
        return root

    def _caches(self, flags: dict[str, str]) -> list[tuple[Path, str]]:
        """Of RUN --mount=type=cache,target=FOLDER."""
        if "mount" not in flags:
            return []
        mount = dict(part.split("=", 1) for part in flags["mount"].split(","))
        if mount.get("type") != "cache":
            sys.exit(f"RUN --mount={flags['mount']} is not known here")
        cache = self._work / "cache" / mount["target"].strip("/").replace("/", "-")
        cache.mkdir(parents=True, exist_ok=True)
        return [(cache, mount["target"])]

    def _copy(self, root: Path, workdir: str, words: list[str], flags: dict[str, str]) -> None:
        source = self._roots[flags["from"]] if "from" in flags else self._context
        target = root / str(Path(workdir) / words[-1]).strip("/")
        for name in words[:-1]:
            path = source / name.strip("/")
            # A folder's content, a file as itself or into a folder: as COPY does.
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                run(["cp", "-a", f"{path}/.", str(target)])
            else:
                into = target / path.name if words[-1].endswith("/") else target
                into.parent.mkdir(parents=True, exist_ok=True)
                run(["cp", str(path), str(into)])
                if "chmod" in flags:
                    into.chmod(int(flags["chmod"], 8))


@contextmanager
def running(
    image: Stage, box: Box, environment: dict[str, str], arguments: list[str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The image's command with `arguments` behind it, until healthy; ends by SIGTERM, which must
    exit with 0.
    """
    words = [word for name in ("ENTRYPOINT", "CMD") for word in _last(image, name).words]
    user, workdir = _last(image, "USER").value, _last(image, "WORKDIR").value
    say(f"run as {user}: {shlex.join([*words, *arguments])}")
    health = health_command(_last(image, "HEALTHCHECK"))
    with log.open("wb") as out:
        process = subprocess.Popen(
            box.command([*words, *arguments], environment, workdir, user),
            stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 120
        check = box.command(health, environment, workdir, user)
        while subprocess.run(check, capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"It did not become healthy:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        say(f"healthy: {shlex.join(health)}")
        yield process
        # Its first process, in its own namespace number 1, is the child of unshare's.
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(first), signal.Signals[_last(image, "STOPSIGNAL").value])
        code = process.wait(60)
        if code != 0:
            sys.exit(f"After {signal.SIGTERM.name} it ended with {code}, not 0:\n{log.read_text()}")
        say("ended with 0 after SIGTERM")
    finally:
        process.kill()


def prove(image: Stage, root: Path, environment: dict[str, str], model: Path | None) -> None:
    """Run the image: with the echo engine, and with the real one where there is a model."""
    log = root.parent.parent / "run.log"
    volume = root.parent.parent / "volume"
    owner = int(_last(image, "USER").value.partition(":")[0])
    for engine in ["echo", *(["vllm"] if model else [])]:
        shutil.rmtree(volume, ignore_errors=True)
        volume.mkdir(mode=0o750)
        os.chown(volume, owner, owner)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Its network is this machine's, where it does not listen without keys unless told to.
        inside = {
            **environment,
            "PACKHORSE_HTTP__PORT": str(port),
            "PACKHORSE_AUTH__WITHOUT_KEYS": "inference",
        }
        box = Box(root, caches=[(volume, _last(image, "VOLUME").value)])
        if model:
            box.binds.append((model.resolve(), "/models/model"))
        started_s = time.monotonic()
        with running(image, box, inside, ["--engine", engine], log) as process:
            text = ask(port, process, log)
            say(f"{engine} answered {text!r} after {time.monotonic() - started_s:.0f} s")


def ask(port: int, process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until ready, ask one question, with log-probabilities: those make torch compile."""
    url = f"http://127.0.0.1:{port}"
    deadline_s = time.monotonic() + 400
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"It did not become ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
        name = json.load(answer)["data"][0]["id"]
    body = {"model": name, "messages": [{"role": "user", "content": ASKED}], "temperature": 0,
            "logprobs": True, "top_logprobs": 2}  # fmt: skip
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def make_base(work: Path) -> None:
    """What stands in for the base image."""
    base = work / "base"
    if not (base / "usr/bin/python3").exists():
        run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(base)])
    for name in ("python", "python3", "pip"):
        link = base / "usr/local/bin" / name
        if not link.is_symlink():
            link.symlink_to("/usr/bin/pip3" if name == "pip" else "/usr/bin/python3")


def run(words: list[str]) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(f"It ended with {done.returncode}: {words[0]} ... {words[-1][-200:]}")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _last(image: Stage, name: str) -> Instruction:
    found = image.last(name)
    if found is None:
        sys.exit(f"The Dockerfile has no {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a Dockerfile's steps without Docker.")
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 12 GB free")
    parser.add_argument("--model", type=Path, help="serve this folder with the real engine, too")
    parser.add_argument("--bind", type=Path, action="append", default=[], help="for pip, read-only")
    parser.add_argument("--reuse", action="store_true", help="run what was built before")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("chroot and mounts need root.")
    started_s = time.monotonic()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stages = parse(options.dockerfile.read_text())
    context = work / "context"
    shutil.rmtree(context, ignore_errors=True)
    if not options.reuse:
        shutil.rmtree(work / "stages", ignore_errors=True)
    files = context_files(ROOT, (ROOT / ".dockerignore").read_text())
    for name in files:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    context_bytes = sum((context / name).stat().st_size for name in files)
    say(f"context: {len(files)} files, {context_bytes / 1e6:.2f} MB")
    make_base(work)
    arguments = dict(text.split("=", 1) for text in options.build_arg)
    builder = Builder(work, arguments, options.bind, reuse=options.reuse)
    for stage in stages:
        root = builder.build(stage)
    prove(whole(stages), root, builder.environments[stages[-1].name], options.model)
    size = int(subprocess.check_output(["du", "-sxm", str(root)]).split()[0])
    print(json.dumps({
        "context_bytes": context_bytes, "stage_s": builder.seconds, "root_mib": size,
        "total_s": round(time.monotonic() - started_s, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
