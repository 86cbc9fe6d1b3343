"""What vLLM loads in each of its processes (pyproject.toml, `vllm.general_plugins`), those that
`quantize verify` starts too: a kernel for 4-bit weights, and JSON grammars that end.
"""

from __future__ import annotations

from packhorse.serve.engines.vllm.patches import avx2_int4, json_whitespace

NAME = "packhorse"  # in pyproject.toml; VLLM_PLUGINS may say which plugins are loaded


def register() -> None:
    """vLLM may call it twice in a process, which is as once."""
    avx2_int4.register()
    json_whitespace.register()
