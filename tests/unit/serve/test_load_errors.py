"""Why a model was not loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from packhorse.serve.engines.vllm.load_errors import MissingModules


def test_a_package_that_only_the_log_names() -> None:
    """vLLM looks at a model's class in another process, whose error it writes to the log."""
    with MissingModules() as missing:
        logging.getLogger("vllm.model_executor.models.registry").error(
            "Error in inspecting: ModuleNotFoundError: No module named 'torchvision.transforms'"
        )
    said = missing.explain(Path("llava"), ValueError("failed to be inspected"))
    assert said.startswith("vLLM could not load llava: this kind of model needs torchvision")
    assert "failed to be inspected" not in said


def test_any_other_error_is_told_as_it_is() -> None:
    with MissingModules() as missing:
        pass
    logging.getLogger("vllm").error("No module named 'later'")
    assert missing.explain(Path("x"), ValueError("why")) == "vLLM could not load x: why"
