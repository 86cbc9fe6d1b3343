"""Images of a conversation: from a data URL, or from a host that the settings allow, to a decoded
picture. Everything is bounded: bytes, pixels, images, time, and pictures decoded at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image, ImageOps

from packhorse.serve.errors import Invalid
from packhorse.serve.messages import Message
from packhorse.serve.settings.engine import ImageSettings
from packhorse.serve.settings.hosts import canonical

# What PIL may recognize. Its other decoders are larger targets, and nobody sends their formats.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
FETCHING_AT_ONCE = 8
DECODING_AT_ONCE = 2
"""Calls at once that fetch images, and that have decoded ones."""
JPEG, JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
MAX_SCANS = 64
"""A progressive JPEG has about ten scans. Each takes a pass over all pixels, and few bytes."""
PARAM = "messages"
# IPv6 networks whose last 32 bits are an IPv4 address.
EMBEDDING = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """`digest` is the SHA-256 of the encoded bytes. `picture` is in RGB."""

    digest: bytes
    picture: Image.Image


def image_url_of(part: Any) -> str | None:
    """The URL of a content part in OpenAI's form; None for a part of another type."""
    if isinstance(part, dict) and part.get("type") == "image_url":
        url: str = part["image_url"]["url"]
        return url
    return None


def image_urls(messages: Sequence[Message]) -> list[str]:
    """The URLs of all images, in the order of the conversation."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [url for url in map(image_url_of, parts) if url is not None]


def is_public(address: str) -> bool:
    """Whether the IP address is one of the internet's, and not of this machine or its networks."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if any(found in network for network in EMBEDDING):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if found.is_site_local or (inner is not None and not inner.is_global):
            return False
    return found.is_global and not found.is_multicast


class ImageLoader:
    """Loads the images of requests. One for each engine."""

    def __init__(
        self, settings: ImageSettings, *, accepts_address: Callable[[str], bool] = is_public
    ) -> None:
        """`accepts_address` says whether an IP address may be connected to."""
        self._settings = settings
        self._accepts_address = accepts_address
        self._fetching = asyncio.Semaphore(FETCHING_AT_ONCE)
        self._decoding = asyncio.Semaphore(DECODING_AT_ONCE)
        # Of its own: a decoder cannot be cancelled, and must not keep other work waiting.
        self._threads = ThreadPoolExecutor(DECODING_AT_ONCE, "images")

    @asynccontextmanager
    async def loaded(self, urls: Sequence[str]) -> AsyncIterator[list[LoadedImage]]:
        """The images, decoded. Only so many calls at once have pictures: use them, and leave the
        context. Raises Invalid for the first image that cannot be had.
        """
        limit = self._settings.max_images
        if len(urls) > limit:
            raise Invalid(
                f"The conversation has {len(urls)} images, and this server takes {limit} in a "
                "request; leave some out.",
                param=PARAM,
            )
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as held:
            encoded: list[str | bytes] = list(urls)
            remote = [place for place, url in enumerate(urls) if DATA_URL.match(url[:80]) is None]
            if remote:  # a slow host keeps nobody's data URLs waiting
                await held.enter_async_context(self._fetching)
                for place in remote:
                    encoded[place] = await self._fetch(_name(place), urls[place])
            await held.enter_async_context(self._decoding)
            yield [
                await loop.run_in_executor(self._threads, self._decoded, _name(place), source)
                for place, source in enumerate(encoded)
            ]

    def _decoded(self, name: str, source: str | bytes) -> LoadedImage:
        """`source` is a data URL or the encoded image."""
        if isinstance(source, bytes):
            return self._decode(name, source)
        begin = source.index(",") + 1
        self._check_size(name, (len(source) - begin) * 3 // 4 - 2)
        try:
            data = base64.b64decode(source[begin:], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Invalid(f"{name}: the data URL is not valid base64.", param=PARAM) from error
        return self._decode(name, data)

    def _decode(self, name: str, data: bytes) -> LoadedImage:
        self._check_size(name, len(data))
        if data.startswith(JPEG) and data.count(JPEG_SCAN) > MAX_SCANS:
            raise Invalid(
                f"{name} is a JPEG of more than {MAX_SCANS} scans; send a baseline JPEG.",
                param=PARAM,
            )
        limit = self._settings.max_pixels
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height <= limit:
                    turned = ImageOps.exif_transpose(opened)
                    return LoadedImage(hashlib.sha256(data).digest(), _in_rgb(turned))
        except Image.DecompressionBombError:
            pass  # PIL's own limit
        except Exception as error:  # decoders raise many classes for what is malformed
            raise Invalid(
                f"{name} cannot be decoded; send a complete {', '.join(FORMATS)} file.",
                param=PARAM,
            ) from error
        raise Invalid(
            f"{name} has more pixels than this server's {limit}; send a smaller one.",
            param=PARAM,
        )

    def _check_size(self, name: str, size: int) -> None:
        if size > self._settings.max_bytes:
            raise Invalid(
                f"{name} has more bytes than this server's {self._settings.max_bytes}; send a "
                "smaller one.",
                param=PARAM,
            )

    async def _fetch(self, name: str, url: str) -> bytes:
        """The bytes behind the URL. No redirect is followed: it could lead anywhere."""
        if not url.startswith(("http://", "https://")):
            raise Invalid(
                f"{name} is neither a data URL (data:image/png;base64,...) nor an http(s) URL.",
                param=PARAM,
            )
        settings = self._settings
        host = self._allowed_host(name, url)
        try:
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(self._accepts_address), use_dns_cache=False
            )
            async with (
                asyncio.timeout(settings.fetch_timeout_s),
                aiohttp.ClientSession(connector=connector, trust_env=False) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise Invalid(
                        f"{name}: {host} answered {response.status}, not 200; redirects are not "
                        "followed.",
                        param=PARAM,
                    )
                data = bytearray()
                async for piece in response.content.iter_chunked(2**16):
                    data += piece
                    self._check_size(name, len(data))
                return bytes(data)
        except TimeoutError as error:
            raise Invalid(
                f"{name}: {host} did not send it within {settings.fetch_timeout_s:g} s.",
                param=PARAM,
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Invalid(
                f"{name} could not be fetched from {host}: {_reason(error)}.", param=PARAM
            ) from error

    def _allowed_host(self, name: str, url: str) -> str:
        """The URL's host. Raises Invalid when it may not be asked."""
        try:
            parsed = urlsplit(url)
            host = canonical(parsed.hostname or "")
            has_login = parsed.username is not None or parsed.password is not None
        except ValueError as error:
            raise Invalid(f"{name}: the URL is malformed.", param=PARAM) from error
        if host not in self._settings.allowed_hosts or has_login:
            raise Invalid(
                f"{name}: this server does not fetch images from this host; send the image as a "
                "data URL, or ask the operator to add the host to engine.images.allowed_hosts.",
                param=PARAM,
            )
        try:
            is_refused = not self._accepts_address(host)
        except ValueError:
            return host  # a name; the resolver checks its addresses
        if is_refused:
            raise Invalid(f"{name}: {host} is not a public address.", param=PARAM)
        return host


def _name(place: int) -> str:
    return f"Image {place + 1}"


class _Refused(OSError):
    """The name belongs to an address that may not be connected to."""


class _CheckedResolver(AbstractResolver):
    """aiohttp's resolver: it connects to the addresses that were checked, not to those of another
    look-up.
    """

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        self._accepts = accepts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        if not all(self._accepts(str(address[0])) for *_, address in found):
            raise _Refused("its address is not a public one")
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Nothing to close."""


def _reason(error: BaseException) -> str:
    """Why a connection failed, without the URL, which may hold a secret."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _Refused):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return "the connection failed"


def _in_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; what is transparent becomes white."""
    if image.mode == "RGB":
        image.load()
        return image.copy()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
