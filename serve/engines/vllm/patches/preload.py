"""What the nursery imports first: from here on nothing is collected, until something is born there.

The collector looks at all that was imported again and again while more is, and finds nothing: a
sixth of the time that it takes. Nor does it look at that in what is born: vLLM collects many times
while it loads a model.
"""

import gc
import os


def _born() -> None:
    gc.freeze()
    gc.enable()


gc.disable()
os.register_at_fork(after_in_child=_born)
