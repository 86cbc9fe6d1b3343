"""The online stage: one server that loads a model folder into a vLLM engine and answers
OpenAI-compatible HTTP.
"""
