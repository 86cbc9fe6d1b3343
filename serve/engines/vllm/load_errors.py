"""Why a model could not be loaded, where vLLM says so on its log alone."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import TracebackType

MISSING = re.compile(r"No module named '([A-Za-z0-9_]+)")


class MissingModules(logging.Handler):
    """While entered: reads vLLM's log for Python packages that a model needs and that are not
    installed. vLLM looks at a model's class in another process, and raises an error that only
    points to the log.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._names: set[str] = set()
        self._logger = logging.getLogger("vllm")

    def __enter__(self) -> MissingModules:
        self._logger.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Note the packages that the record names."""
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        self._names.update(MISSING.findall(f"{text}\n{error}"))

    def explain(self, folder: Path, error: Exception) -> str:
        """The message for an error of loading the model in `folder`."""
        names = self._names | set(MISSING.findall(str(error)))
        if not names:
            return f"vLLM could not load {folder}: {error}"
        import torch

        release = torch.__version__.partition("+")[0]
        listed = ", ".join(sorted(names))
        return (
            f"vLLM could not load {folder}: this kind of model needs {listed}, which this "
            f"installation does not have. Install the build for torch {release}, or serve another "
            "model."
        )
