"""Rooms and the import arrows between them: `python tools/rooms.py [TREE]`.

A room is a folder of `serve/` or `quantize/`, or a module that stands beside the folders. An arrow
is an import across rooms, at the top of a file or inside a function; arrows within a room do not
count. A circle is a set of rooms that import each other, directly or through others. Reads source
text alone, so TREE may be any version's checkout (default: this one).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("serve", "quantize")


def module_of(path: Path, root: Path) -> str:
    """`serve.api.chat` for serve/api/chat.py."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, root: Path) -> Iterator[str]:
    """Modules that the file's import statements name, ours without the prefix `packhorse.`;
    `from packhorse.serve import errors` gives serve.errors.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("packhorse.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("packhorse.")
            for alias in node.names:
                inner = root / Path(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{module}.{alias.name}" if is_module else module


def room_of(module: str, root: Path) -> str:
    """The room that a module of ours belongs to: `serve.rest` for serve.rest.sse."""
    parts = module.split(".")
    while len(parts) > 1 and not (root / Path(*parts)).is_dir():
        parts.pop()
    return ".".join(parts) if len(parts) > 1 else module


def arrows_of(stage: str, root: Path) -> dict[str, set[str]]:
    """Room -> rooms that it imports, for every room of the stage."""
    arrows: dict[str, set[str]] = {}
    for path in sorted((root / stage).rglob("*.py")):
        room = room_of(module_of(path, root), root)
        if room == stage:
            continue  # its __init__.py
        others = {
            room_of(name, root) for name in imports_of(path, root) if name.startswith(stage + ".")
        }
        arrows.setdefault(room, set()).update(others - {room, stage})
    return arrows


def circles_of(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The sets of two rooms or more that reach each other."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for room in arrows.get(waiting.pop(), ()):
                if room not in found:
                    found.add(room)
                    waiting.append(room)
        return found

    reach = {room: reached(room) for room in arrows}
    circles = [
        {room, *(other for other in reach[room] if room in reach.get(other, ()))}
        for room in arrows
        if room in reach[room]
    ]
    return [circle for n, circle in enumerate(circles) if circle not in circles[:n]]


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    for stage in STAGES:
        arrows = arrows_of(stage, root)
        files = [
            path for path in (root / stage).rglob("*.py")
            if path.name != "__init__.py" and "pb" not in path.parts
        ]  # fmt: skip
        count = sum(map(len, arrows.values()))
        print(f"{stage}: {len(files)} modules, {len(arrows)} rooms, {count} arrows")
        for room, others in sorted(arrows.items()):
            print(f"  {room} -> {', '.join(sorted(others)) or '-'}")
        for circle in circles_of(arrows):
            print(f"  CIRCLE: {', '.join(sorted(circle))}")


if __name__ == "__main__":
    main()
