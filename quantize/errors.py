"""Errors a user of `quantize` can meet; the command line prints the message and exits with 2."""


class QuantizeError(Exception):
    """Base of all; the message has the value, the limit and the way out."""


class BadInput(QuantizeError):
    """A path, a file or an option that cannot be used."""


class Unsupported(QuantizeError):
    """A model or combination that this version cannot quantize, or that vLLM would not load."""


class OutOfMemory(QuantizeError):
    """A run needs more memory than there is."""


class Unloadable(QuantizeError):
    """vLLM does not load the finished checkpoint, or dies of it."""
