"""What vLLM loads in each of its processes (pyproject.toml, `vllm.general_plugins`), those that
`quantize verify` starts too: a kernel for 4-bit weights, and JSON grammars that end.
"""

from __future__ import annotations

from packhorse.serve.engines.vllm.patches import reason

NAME = "packhorse"  # in pyproject.toml; VLLM_PLUGINS may say which plugins are loaded


def register() -> None:
    """Install the two patches where they fit. vLLM may call it twice in a process, which is as
    once. The server's process warns of one that does not fit, and refuses what needs it.
    """
    if reason("avx2_int4") is None:
        from packhorse.serve.engines.vllm.patches import avx2_int4

        avx2_int4.install()
    if reason("json_whitespace") is None:
        from packhorse.serve.engines.vllm.patches import json_whitespace

        json_whitespace.install()
