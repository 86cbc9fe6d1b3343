"""Compressed request bodies (RFC 9110, section 8.4): agents compress what is large. What comes out
is bounded as it is written, so a small body cannot become a huge one.
"""

from __future__ import annotations

import zlib

import zstandard
from packhorse.serve.errors import Invalid, TooLarge, UnsupportedCoding

CODINGS = ("gzip", "deflate", "zstd")
MAX_CODINGS = 2  # one over the other
# 128 bytes may become 4 MiB: a block of zstd has at least three, and at most 128 KiB of content.
PIECE_BYTES = 128


def decoded(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its codings, `Content-Encoding`'s value. Raises UnsupportedCoding, Invalid
    when it is not what it says, TooLarge above max_bytes.
    """
    names = [name.strip().lower().removeprefix("x-") for name in encoding.split(",")]
    names = [name for name in names if name and name != "identity"]
    unknown = [name for name in names if name not in CODINGS]
    if unknown or len(names) > MAX_CODINGS:
        raise UnsupportedCoding(
            f"Content-Encoding {encoding[:80]!r} is not understood here; send "
            f"{', '.join(CODINGS)}, or the body as it is."
        )
    for name in reversed(names):
        try:
            raw = _zstd(raw, max_bytes) if name == "zstd" else _zlib(raw, name, max_bytes)
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise Invalid(f"The body is not valid {name}, as its Content-Encoding says.") from error
    return raw


def _zlib(raw: bytes, name: str, max_bytes: int) -> bytes:
    if name == "gzip":
        window = 31
    else:  # what is called deflate comes with a zlib header, or without
        window = 15 if raw[:1] and raw[0] & 0x0F == 8 and raw[0] >> 4 <= 7 else -15
    found = bytearray()
    while True:
        decoder = zlib.decompressobj(window)
        found += decoder.decompress(raw, max_bytes + 1 - len(found))
        _check(len(found), max_bytes)
        if not decoder.eof:
            raise EOFError
        raw = decoder.unused_data
        if not raw or (name == "gzip" and not raw.strip(b"\0")):  # gzip may be filled up
            return bytes(found)
        if name != "gzip":  # which alone may have several members
            raise EOFError


def _zstd(raw: bytes, max_bytes: int) -> bytes:
    # A frame's window is memory that it asks for: 8 MiB is what RFC 8878 has every decoder take.
    library = zstandard.ZstdDecompressor(max_window_size=8 * 2**20)
    decoder, found, is_over = library.decompressobj(), bytearray(), False
    for start in range(0, len(raw), PIECE_BYTES):
        piece = raw[start : start + PIECE_BYTES]
        while piece:
            if is_over:  # another frame
                decoder = library.decompressobj()
            found += decoder.decompress(piece)
            _check(len(found), max_bytes)
            is_over = decoder.eof
            piece = decoder.unused_data if is_over else b""
    if not is_over:
        raise EOFError
    return bytes(found)


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLarge(f"The body is above the limit of {max_bytes} bytes, decoded; send less.")
