"""What the forkserver imports first: it switches Python's garbage collector off, until an engine
process is forked.

The collector rescans every imported module during the import and frees nothing: a sixth of the
time. In the forked process the imported modules stay out of its sight: vLLM calls the collector
many times while it loads a model.
"""

import gc
import os


def _collect_in_the_fork() -> None:
    gc.freeze()
    gc.enable()


gc.disable()
os.register_at_fork(after_in_child=_collect_in_the_fork)
