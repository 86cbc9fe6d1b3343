"""Compressed request bodies (RFC 9110, section 8.4): agents compress what is large. What comes out
is bounded as it is written, so a small body cannot become a huge one.
"""

from __future__ import annotations

import zlib

import zstandard

from serve.errors import Invalid, TooLarge, UnsupportedCoding

CODINGS = ("gzip", "deflate", "zstd")
MAX_CODINGS = 2  # one over the other
PIECE_BYTES = 64 * 1024


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
    decoder = zlib.decompressobj(window)
    found = decoder.decompress(raw, max_bytes + 1)
    _check(len(found), max_bytes)
    if not decoder.eof:
        raise EOFError
    return found


def _zstd(raw: bytes, max_bytes: int) -> bytes:
    found = bytearray()
    # A frame's window is memory that it asks for: 8 MiB is what RFC 8878 has every decoder take.
    reader = zstandard.ZstdDecompressor(max_window_size=8 * 2**20).stream_reader(
        raw, read_across_frames=True
    )
    while piece := reader.read(min(PIECE_BYTES, max_bytes + 1)):
        found += piece
        _check(len(found), max_bytes)
    return bytes(found)


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLarge(f"The body is above the limit of {max_bytes} bytes, decoded; send less.")
