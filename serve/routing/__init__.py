"""Routing: which adapter answers a conversation, or the base. Stages: rules, learned table,
default.

`config` reads the routes file; `rules` and `learned` are the two stages that decide by text, and
`cascade` calls them in order. `train_process` trains the learned table in a child process with
`train`, which alone imports scikit-learn. `rollout` replaces rules and table together, after a
self-test. Nothing here knows the engine or a protocol: the pipeline calls `Router.decide()`.
"""
