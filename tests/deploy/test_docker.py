"""The image: its recipe, its context, and what can be run of it without a Docker engine."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from packhorse.serve.settings import ENV_PREFIX
from tests.conftest import BIN, DEMO, ROOT, Server, running_server
from tests.deploy.docker_check import DOCKERFILE, SETTINGS, check_image, environment_of
from tests.deploy.shared import Breakage, assert_reported, cases, copies
from tools.dockerfile import DockerfileError, context_files, parse, whole

HEALTH = ROOT / "deploy/docker/healthcheck.py"
IGNORE = ".dockerignore"

BREAKAGES = cases(
    ("root", DOCKERFILE, "USER 10001:10001", "USER 0:0", "not root"),
    ("named-user", DOCKERFILE, "USER 10001:10001", "USER packhorse", "not the numbers"),
    ("no-user", DOCKERFILE, "USER 10001:10001\n", "", "no USER"),
    ("no-version", DOCKERFILE, "python:3.11.14-slim-bookworm", "python:3.11", "not pinned"),
    ("latest", DOCKERFILE, "python:3.11.14-slim-bookworm", "python:latest", "DL3007"),
    ("no-health-check", DOCKERFILE, "HEALTHCHECK --", "LABEL --", "no HEALTHCHECK"),
    ("health-path", DOCKERFILE, "/health/live", "/healthz", "/health/live needs no key"),
    ("health-ready", DOCKERFILE, "/health/live", "/health/ready", "needs no key and no model"),
    ("health-period", DOCKERFILE, "--start-period=120s", "--start-period=5s", "start-period"),
    ("secret", DOCKERFILE, "USER=packhorse", "HF_TOKEN=abc", "HF_TOKEN would be in the image"),
    ("setting", DOCKERFILE, "USER=packhorse", "PACKHORSE_PROT=1", "PACKHORSE_PROT is no setting"),
    ("flag", DOCKERFILE, '"--config"', '"--konfig"', "No such option"),
    ("shell-form", DOCKERFILE, '["tini", "--", "packhorse"]', "packhorse", "run by a shell"),
    ("no-compiler", DOCKERFILE, "g++ libnuma1", "libnuma1", "g++ is not installed"),
    ("no-libnuma", DOCKERFILE, "libnuma1 ", "", "libnuma1 is not installed"),
    ("unknown-instruction", DOCKERFILE, "STOPSIGNAL", "STOPSGNAL", "is not known"),
    ("missing-file", DOCKERFILE, "COPY serve serve", "COPY server serve", "not in the context"),
    ("all-is-sent", IGNORE, "*\n!pyproject", "!pyproject", "does not begin with *"),
    ("demo-is-sent", IGNORE, "!LICENSE", "!LICENSE\n!demo", "bytes, more than"),
    ("code-is-not-sent", IGNORE, "!quantize\n", "", "quantize is not in the context"),
    ("bad-yaml", SETTINGS, "http:\n", "http\n", "could not find expected ':'"),
    ("unknown-name", SETTINGS, "  port:", "  prot:", "http.prot"),
    ("other-port", SETTINGS, "8000", "8080", "not exposed"),
    ("loopback", SETTINGS, "0.0.0.0", "127.0.0.1", "nobody outside"),
    ("open", DOCKERFILE, "WITHOUT_KEYS=loopback", "WITHOUT_KEYS=inference", "to everybody"),
)  # fmt: skip
COVERS = ["deploy/docker/healthcheck.py"]  # below


def test_the_recipe_is_right() -> None:
    assert check_image(ROOT) == []


@pytest.mark.parametrize(
    "breakages",
    copies(
        BREAKAGES,
        "named-user latest health-path health-period setting all-is-sent unknown-name",
        "no-user health-ready shell-form code-is-not-sent",
        "unknown-instruction",
        "other-port loopback",
    ),
)
def test_a_broken_recipe_is_reported(tmp_path: Path, breakages: list[Breakage]) -> None:
    assert_reported(check_image, tmp_path, breakages)


def image_environment(**more: str) -> dict[str, str]:
    """The variables of the image that are settings, and a model."""
    image = whole(parse((ROOT / DOCKERFILE).read_text()))
    ours = {name: value for name, value in environment_of(image).items()
            if name.startswith(ENV_PREFIX)}  # fmt: skip
    return {**ours, f"{ENV_PREFIX}MODEL": str(DEMO / "model"), **more}


def test_the_image_starts_with_keys_or_a_word_alone(tmp_path: Path) -> None:
    arguments = ["serve", "--config", str(ROOT / SETTINGS), "--engine", "echo"]
    done = subprocess.run(
        [BIN / "packhorse", *arguments, "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **image_environment()},
    )
    assert done.returncode == 2
    for said in ("http.host 0.0.0.0", "auth.keys_file", "PACKHORSE_AUTH__WITHOUT_KEYS=inference"):
        assert said in done.stdout + done.stderr
    key = "a-key-for-tests-only"
    for name, value, status in [
        ("PACKHORSE_AUTH__API_KEY", key, 401),
        ("PACKHORSE_AUTH__WITHOUT_KEYS", "inference", 200),
    ]:
        environment = image_environment(**{name: value})
        with running_server(tmp_path, *arguments[1:], environment=environment) as server:
            url = server.url.replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(f"{url}/v1/models").status_code == status
            known = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=known).status_code == 200


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("/health/live", 0, ": 200"),
        ("/health/ready", 0, ": 200"),
        ("/health/nowhere", 1, ": 404"),
    ],
)
def test_health_check_tells_by_its_exit_code(
    echo_server: Server, path: str, code: int, said: str
) -> None:
    port = echo_server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, HEALTH, path, port], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout


def test_health_check_fails_where_nothing_listens() -> None:
    done = subprocess.run([sys.executable, HEALTH, "/health/live", "1"], check=False)
    assert done.returncode == 1


def test_context_makes_a_wheel_that_has_all_files(tmp_path: Path) -> None:
    """The image's second stage, in the environment at hand."""
    files = context_files(ROOT, (ROOT / IGNORE).read_text())
    for path in files:
        (tmp_path / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / path).write_bytes((ROOT / path).read_bytes())
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "src", stdout=subprocess.DEVNULL, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    ours = {f"packhorse/{path}" for path in files if path.parts[0] in {"quantize", "serve"}
            and path.suffix != ".pyi"}  # fmt: skip
    assert ours - packed == set()


@pytest.mark.parametrize(
    ("ignore", "sent"),
    [
        ("*\n!serve\n**/*.pyc", {"serve/a.py", "serve/b/c.py"}),
        ("serve/b", {"keys.yaml", "serve/a.py", "serve/a.pyc", "tools/x.py", "tools/y.py"}),
        ("*\n!tools/x.py", {"tools/x.py"}),
        ("# all\n\n**/*.py", {"keys.yaml", "serve/a.pyc"}),
    ],
)
def test_dockerignore_is_read_as_docker_does(tmp_path: Path, ignore: str, sent: set[str]) -> None:
    for name in ("keys.yaml", "serve/a.py", "serve/a.pyc", "serve/b/c.py", "tools/x.py",
                 "tools/y.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {str(path) for path in context_files(tmp_path, ignore)} == sent


def test_stages_inherit_and_the_last_word_counts() -> None:
    image = whole(
        parse("FROM a:1 AS b\nUSER 1\nFROM b\nRUN --mount=type=x x \\\n# why\n  y\nUSER 2")
    )
    assert image.base == "a:1"
    assert [each.name for each in image.instructions] == ["USER", "RUN", "USER"]
    assert image.instructions[1].value == "x y"
    assert image.instructions[1].flags == {"mount": "type=x"}
    last = image.last("USER")
    assert last is not None
    assert last.value == "2"


@pytest.mark.parametrize("text", ["", "RUN x", "FROM a\nADD b c", "FROM a b c d", "FROM a\nRUN \\"])
def test_what_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(DockerfileError):
        parse(text)
