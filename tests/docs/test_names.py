"""Settings, metrics and files that the pages for users name exist."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from packhorse.serve.settings import Settings
from packhorse.serve.settings.renamed import RENAMED
from tests.conftest import ROOT
from tests.docs.examples import user_pages

PAGES = [*user_pages(), "docs/glossary.md"]
METRIC = re.compile(r"\bpackhorse_[a-z_]+")
SETTING = re.compile(r"`(\w+)\.(\w+)(?::[^`]*)?`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
SECTIONS = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
# Of `engine`, whose section takes any argument of vLLM, what is no field of ours.
VLLM_ARGUMENTS = {"max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"}


FORMERLY = "\n## Formerly"
"""The glossary's section of names that are no longer used."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").partition(FORMERLY)[0]


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    for section, name in SETTING.findall(text_of(page)):
        if section in SECTIONS and not (section == "engine" and name in VLLM_ARGUMENTS):
            assert name in SECTIONS[section].model_fields, f"{page}: {section}.{name}"


@pytest.mark.parametrize("page", PAGES)
def test_metrics_exist(page: str) -> None:
    """As docs/metrics.md has them, which is made from the code; or as the beginning of several."""
    rows = [row for row in text_of("docs/metrics.md").splitlines() if row.startswith("| `")]
    known = set(METRIC.findall("\n".join(rows)))
    for name in METRIC.findall(text_of(page)):
        family = name.endswith("_") and any(each.startswith(name) for each in known)
        assert name in known or family, f"{page}: {name}"


def test_former_names_of_settings_are_in_the_glossary() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition(FORMERLY)[2]
    for section, names in RENAMED.items():
        for old, new in names.items():
            assert f"| `{section}.{old}` | `{section}.{new}` |" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(text_of(page)):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
