"""Engines: the protocol (`base`), the supervisor that keeps one alive, and the concrete ones, which
only `serve.engine_builder` knows by name.
"""
