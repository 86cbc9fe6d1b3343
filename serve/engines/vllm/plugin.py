"""What vLLM loads in each of its processes (pyproject.toml, `vllm.general_plugins`), those that
`quantize verify` starts too: a kernel for 4-bit weights, and JSON grammars that end.
"""

from __future__ import annotations

from serve.engines.vllm import json_whitespace, unpacked

NAME = "packhorse"  # in pyproject.toml; VLLM_PLUGINS may say which plugins are loaded


def register() -> None:
    """vLLM may call it twice in a process, which is as once."""
    unpacked.register()
    json_whitespace.register()
