"""What is wrong with the image's recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from packhorse.serve.settings import ENV_PREFIX, Settings
from tests.conftest import BIN, ROOT
from tests.deploy.shared import (
    PINNED,
    SECRET_NAME,
    command_problems,
    config_of,
    output_of,
    read_settings,
    seconds,
    yaml_problems,
)
from tools.dockerfile import (
    DockerfileError,
    Stage,
    context_files,
    health_command,
    parse,
    substitute,
    whole,
)

DOCKERFILE = "deploy/docker/Dockerfile"
SETTINGS = "deploy/docker/packhorse.yaml"
# Sent to the builder in all; a model or an environment would be past it.
CONTEXT_BYTES = 4_000_000
# Without these the engine fails, but only when it needs them: see the Dockerfile.
NEEDED_PACKAGES = ("g++", "libnuma1", "tini")


def check_image(root: Path) -> list[str]:
    try:
        stages = parse((root / DOCKERFILE).read_text())
    except DockerfileError as error:
        return [str(error)]
    image = whole(stages)
    return [
        *_hadolint(root / DOCKERFILE),
        *_bases(stages),
        *_secrets(stages),
        *_user(image),
        *_health(image),
        *_command(root, stages, image),
        *_packages(image),
        *_context(root, stages),
        *yaml_problems(root / SETTINGS),
        *read_settings(root / SETTINGS)[1],
    ]


def _hadolint(path: Path) -> list[str]:
    tool = BIN / "hadolint"
    if not tool.exists() and shutil.which("hadolint") is None:
        return ["hadolint is not installed; `make setup` does"]
    code, text = output_of(tool if tool.exists() else "hadolint", "--no-color", path)
    return text.splitlines() if code else []


def _bases(stages: list[Stage]) -> list[str]:
    names = {stage.name for stage in stages}
    outside = {stage.base for stage in stages} - names
    problems = [f"base {base} is not pinned" for base in outside if not PINNED.fullmatch(base)]
    if len(stages) < 2 or "COPY" not in {each.name for each in stages[-1].instructions}:
        problems.append("not multi-stage: what builds would be in the image")
    return problems


def _secrets(stages: list[Stage]) -> list[str]:
    return [
        f"line {each.line}: {name} would be in the image for all to read"
        for stage in stages
        for each in stage.instructions
        if each.name in {"ENV", "ARG", "LABEL"}
        for name in each.pairs
        if SECRET_NAME.search(name)
    ]


def _user(image: Stage) -> list[str]:
    user = image.last("USER")
    if user is None:
        return ["no USER: it would run as root"]
    # A name does not do: Kubernetes' runAsNonRoot cannot tell whose it is.
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.value):
        return [f"USER {user.value}: not the numbers of a user and group that are not root"]
    after = [each for each in image.instructions if each.line > user.line]
    return [f"line {each.line}: runs after USER" for each in after if each.name == "RUN"]


def _health(image: Stage) -> list[str]:
    health = image.last("HEALTHCHECK")
    if health is None:
        return ["no HEALTHCHECK"]
    try:
        words = health_command(health)
    except (DockerfileError, ValueError) as error:
        return [f"HEALTHCHECK: {error}"]
    problems = []
    if words[-1] != "/health/live":
        problems.append(f"HEALTHCHECK asks {words[-1]}; /health/live needs no key and no model")
    if "start-period" not in health.flags or seconds(health.flags["start-period"]) < 60:
        problems.append("HEALTHCHECK: the start-period is shorter than slow imports")
    copied = [each.words[-1] for each in image.instructions if each.name == "COPY"]
    if words[-2] not in copied:
        problems.append(f"HEALTHCHECK runs {words[-2]}, which is not copied into the image")
    return problems


def _command(root: Path, stages: list[Stage], image: Stage) -> list[str]:
    entry, command = image.last("ENTRYPOINT"), image.last("CMD")
    if entry is None or command is None:
        return ["no ENTRYPOINT or no CMD"]
    if not (entry.value.startswith("[") and command.value.startswith("[")):
        return ["ENTRYPOINT or CMD is run by a shell, which does not pass SIGTERM on"]
    if entry.words[-1] != "packhorse":
        return [f"ENTRYPOINT ends with {entry.words[-1]}, not packhorse"]
    problems = command_problems(command.words)
    config = config_of(command.words)
    copied = {each.words[-1]: each.words[0] for each in image.instructions if each.name == "COPY"}
    if config not in copied or not (root / copied[config]).is_file():
        problems.append(f"CMD reads {config}, which is not copied into the image")
    settings, _ = read_settings(root / SETTINGS)
    exposed = [] if image.last("EXPOSE") is None else image.last("EXPOSE").words  # type: ignore[union-attr]
    if settings is not None:
        if str(settings.http.port) not in exposed:
            problems.append(f"http.port {settings.http.port} is not exposed")
        if settings.http.host != "0.0.0.0":
            problems.append(f"http.host is {settings.http.host}: nobody outside could reach it")
        if settings.auth.without_keys != "inference":
            problems.append("auth.without_keys is in the file: another file would not have it")
    known = {f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields}
    environment = environment_of(image)
    if environment.get(f"{ENV_PREFIX}AUTH__WITHOUT_KEYS") != "loopback":
        problems.append("without keys it would listen to everybody")
    problems += [
        f"ENV {name} is no setting"
        for name in environment
        if name.startswith(ENV_PREFIX) and name.partition("__")[0] not in known
    ]
    arguments = [name for stage in stages for each in stage.instructions
                 if each.name == "ARG" for name in each.pairs]  # fmt: skip
    if "BUILD" not in arguments:
        problems.append("no build argument BUILD, which chooses cpu or cuda")
    return problems


def environment_of(image: Stage) -> dict[str, str]:
    return {name: value for each in image.instructions if each.name == "ENV"
            for name, value in each.pairs.items()}  # fmt: skip


def _packages(image: Stage) -> list[str]:
    installed = " ".join(
        each.value for each in image.instructions
        if each.name == "RUN" and "apt-get install" in each.value
    ).split()  # fmt: skip
    return [f"{name} is not installed" for name in NEEDED_PACKAGES if name not in installed]


def _context(root: Path, stages: list[Stage]) -> list[str]:
    """The files are the repository's, as chosen by the .dockerignore under test."""
    ignore = (root / ".dockerignore").read_text()
    rules = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    if not rules or rules[0] != "*":  # and to look at all of it would take long
        return [".dockerignore does not begin with *: what is not named would be sent"]
    files = context_files(ROOT, ignore)
    size = sum((ROOT / path).stat().st_size for path in files)
    problems = []
    if size > CONTEXT_BYTES:
        problems.append(f"the context has {size} bytes, more than {CONTEXT_BYTES}")
    for stage in stages:
        for each in stage.instructions:
            if each.name != "COPY" or "from" in each.flags:
                continue
            for word in each.words[:-1]:
                source = Path(substitute(word, {}))
                if not any(path == source or source in path.parents for path in files):
                    problems.append(f"line {each.line}: {source} is not in the context")
    return problems
