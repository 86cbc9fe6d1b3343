"""Settings that had another name in an earlier release. The earlier names are taken for one
release, with a warning that names the new one; they are errors after it, like every unknown name.
"""

from __future__ import annotations

import logging
from typing import Any

from packhorse.serve.errors import StartupError

logger = logging.getLogger("packhorse")

# section -> earlier name -> name. Remove an entry one release after it came.
RENAMED: dict[str, dict[str, str]] = {
    "admission": {"max_running": "max_in_engine"},
    "adapters": {"max_running": "max_concurrent_per_adapter", "turn_tokens": "quantum_tokens"},
    "engine": {"loras_per_slot": "lora_oversubscription"},
}


class Renames:
    """Applies the table to the values of each source of one load."""

    def __init__(self) -> None:
        self._given: set[tuple[str, str]] = set()
        self._told: set[tuple[str, str]] = set()

    def applied(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of one source, nested like the settings tree, under the new names.

        Logs one warning per earlier name. Raises StartupError when a setting has been given under
        both names, by one source or by two.
        """
        found = dict(values)
        for section, names in RENAMED.items():
            given = values.get(section)
            if not isinstance(given, dict):
                continue
            found[section] = {names.get(name, name): value for name, value in given.items()}
            for old, new in names.items():
                self._given |= {(section, name) for name in (old, new) if name in given}
                if (section, old) in self._given:
                    self._check(section, old, new)
        return found

    def _check(self, section: str, old: str, new: str) -> None:
        if (section, new) in self._given:
            raise StartupError(
                f"{section}.{old} and {section}.{new} are both set. The first is the earlier name "
                "of the second; take it out."
            )
        if (section, old) not in self._told:
            self._told.add((section, old))
            logger.warning(
                "The setting %s.%s is now called %s.%s; the next release will refuse the old name",
                section, old, section, new,
            )  # fmt: skip
