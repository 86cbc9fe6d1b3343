"""The routing of a server while adapters and files come, change and go."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from packhorse.serve.errors import Internal, Invalid
from packhorse.serve.routing import router as module
from packhorse.serve.routing.router import Router


class World:
    """Adapters' folders, and a routes file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "routes.yaml"
        self.adapters: dict[str, Path] = {}
        self.known: list[str] = []
        self.routes()
        self.router = Router(
            self.file, lambda: self.adapters, self.adapters, known=lambda: self.known
        )

    def routes(self, *rules: tuple[str, str], learned: bool = False) -> None:
        written = [
            {"name": f"{adapter}-{word}", "adapter": adapter, "when": {"keywords": [word]}}
            for adapter, word in rules
        ]
        document = {"rules": written, "learned": {"enabled": learned}}
        self.file.write_text(json.dumps(document))

    def add(self, name: str, examples: str | None = None) -> None:
        self.adapters[name] = self.folder / name
        self.adapters[name].mkdir()
        if examples is not None:
            (self.adapters[name] / "examples.jsonl").write_text(examples)

    def goes_to(self, text: str) -> str | None:
        message = {"role": "user", "content": text}
        return self.router.decide([message], may_use=lambda _: True).adapter


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_rules_of_the_file(world: World) -> None:
    world.add("clinic")
    world.routes(("clinic", "dose"))
    await world.router.start()
    assert world.goes_to("which dose?") == "clinic"
    assert world.goes_to("hello") is None


async def test_a_rule_for_nobody(world: World) -> None:
    """At a start it waits for its adapter; in a change it is a mistake."""
    world.routes(("clinic", "dose"))
    await world.router.start()
    assert world.goes_to("which dose?") is None
    world.add("clinic")
    assert world.goes_to("which dose?") == "clinic"
    world.routes(("clinik", "dose"))
    with pytest.raises(Invalid, match="clinik"):
        await world.router.reload()


async def test_a_rule_for_one_that_has_failed_waits_for_it(world: World) -> None:
    world.routes(("clinic", "dose"))
    world.known.append("clinic")
    await world.router.start()
    assert world.goes_to("which dose?") is None
    world.add("clinic")
    assert world.goes_to("which dose?") == "clinic"


@pytest.mark.parametrize("examples", ["not json\n", '{"prompt": "only one"}\n', ""])
async def test_bad_examples_of_one_adapter_spoil_nothing(world: World, examples: str) -> None:
    world.add("clinic", examples)
    world.routes(("clinic", "dose"), learned=True)
    await world.router.start()
    assert world.goes_to("which dose?") == "clinic"


async def test_a_training_that_fails_leaves_the_rules(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    async def build(routes: object, *rest: object, **named: object) -> object:
        tried.append(routes)
        if len(tried) == 1:
            raise Internal("the child was killed")
        return await real(routes, *rest, **named)

    real = module.build
    monkeypatch.setattr(module, "build", build)
    world.add("clinic")
    world.routes(("clinic", "dose"), learned=True)
    await world.router.start()
    assert world.goes_to("which dose?") == "clinic"


async def test_bad_new_routes_change_nothing(world: World) -> None:
    world.add("clinic")
    world.routes(("clinic", "dose"))
    await world.router.start()
    world.file.write_text("rules: 5")
    with pytest.raises(Invalid):
        await world.router.reload()
    assert world.goes_to("which dose?") == "clinic"
    world.routes(("clinic", "pill"))
    assert (await world.router.reload())["accepted"] is True
    assert world.goes_to("which dose?") is None
    assert [each["number"] for each in world.router.versions()] == [3, 1]


async def test_it_reloads_when_asked(world: World) -> None:
    """As at SIGHUP; files need not have changed."""
    world.routes()
    await world.router.start()
    watching = asyncio.create_task(world.router.watch())
    number = world.router.versions()[0]["number"]
    world.router.reload_soon()
    async with asyncio.timeout(10):
        while world.router.versions()[0]["number"] == number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    watching.cancel()
