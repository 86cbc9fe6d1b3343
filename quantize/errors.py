"""Errors that users of `quantize` can cause; the command line prints the message and exits with
2."""


class QuantizeError(Exception):
    """Base class. The message has the value, the limit and a way to fix it."""


class BadInput(QuantizeError):
    """A path, a file or an option that cannot be used."""


class Unsupported(QuantizeError):
    """A model or combination that this version cannot quantize, or that vLLM cannot load."""


class OutOfMemory(QuantizeError):
    """A run needs more memory than there is."""


class Unloadable(QuantizeError):
    """The load check failed: vLLM does not load the finished checkpoint, or fails running it."""
