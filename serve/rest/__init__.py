"""OpenAI-compatible HTTP: knows the service and the leaves. Only here is fastapi imported."""
