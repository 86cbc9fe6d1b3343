"""Which adapter a conversation goes to, or none: rules, learned table, default.

`config` reads the routes file; `rules` and `learned` are the two stages that decide by text, and
`cascade` puts them in order. `training` makes the learned table in a child process (with `fitting`,
which alone imports scikit-learn); `generations` changes rules and table together, safely.
Nothing here knows the engine or the web: the server calls `Router.decide()`.
"""
