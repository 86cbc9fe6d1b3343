"""The only folder of `serve` with vllm in it. Its version is pinned exactly; see pyproject.toml."""
