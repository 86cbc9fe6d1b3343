"""Reads the pages for users: their fenced blocks, what each is, and which of them are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "*Not run by the tests:"
"""How a paragraph begins that stands directly above a block which is only read."""
RUN = ("sh", "bash", "python", "yaml")
"""The shells and `python` are run, `yaml` is read as what its first line names. Others are output.
"""

# Pages for those who change Packhorse, records, and tables.
OTHER_PAGES = {
    "glossary.md", "lab-log.md", "metrics.md", "settings.md", "structure.md", "testing.md",
    "vllm-upgrade.md",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    section: str
    """The heading that it stands below."""
    not_run: str
    """Why it is not run; empty: it is."""

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.not_run

    @property
    def name(self) -> str:
        """`keys.yaml` where the first line is the comment `# keys.yaml`, else empty."""
        found = re.match(r"# ([\w-]+\.\w+)\b", self.text)
        return found[1] if found else ""


def user_pages() -> list[str]:
    """Their paths in the repository."""
    docs = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    kept = [name for name in docs if name not in OTHER_PAGES and not name.startswith("add-")]
    return ["README.md", *(f"docs/{name}" for name in kept)]


def blocks_of(page: str, root: Path = ROOT) -> list[Block]:
    text = (root / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", before), re.MULTILINE)
        above = before.rstrip().rpartition("\n\n")[2]
        reason = above.removeprefix(NOT_RUN).strip(" *\n") if above.startswith(NOT_RUN) else ""
        found.append(Block(page, before.count("\n") + 1, match[1], match[2], headings[-1], reason))
    return found


def task_of(page: str, root: Path = ROOT) -> str:
    """The first heading or paragraph of the page that begins with `To `, else empty; before its
    first example.
    """
    text = (root / page).read_text(encoding="utf-8")
    beginning = text[: first.start()] if (first := FENCE.search(text)) else text
    found = re.search(r"^(?:## )?(To .+)$", beginning, re.MULTILINE)
    return found[1] if found else ""
