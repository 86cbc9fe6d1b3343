"""OpenAI-compatible HTTP. Knows the service and the leaves; the only folder that imports fastapi."""
