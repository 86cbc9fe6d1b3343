"""Images of requests: what is taken, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Sequence

import aiohttp.web
import pytest
from PIL import Image
from pydantic import ValidationError

from packhorse.serve.engines.images import DECODING_AT_ONCE, ImageLoader, LoadedImage, is_public
from packhorse.serve.errors import Invalid
from packhorse.serve.settings.engine import ImageSettings


def encoded(size: tuple[int, int] = (8, 4), *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


async def loaded(loader: ImageLoader, urls: Sequence[str]) -> list[LoadedImage]:
    async with loader.loaded(urls) as images:
        return images


async def refusal(loader: ImageLoader, urls: Sequence[str]) -> str:
    with pytest.raises(Invalid) as refused:
        await loaded(loader, urls)
    assert refused.value.param == "messages"
    return refused.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
async def test_an_image_is_decoded(kind: str) -> None:
    data = encoded(kind=kind)
    (image,) = await loaded(ImageLoader(ImageSettings()), [data_url(data, kind.lower())])
    assert image.picture.size == (8, 4)
    assert image.picture.mode == "RGB"
    assert image.digest == hashlib.sha256(data).digest()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16"])
async def test_it_becomes_rgb_and_what_is_transparent_white(mode: str) -> None:
    (image,) = await loaded(ImageLoader(ImageSettings()), [data_url(encoded(mode=mode))])
    assert image.picture.mode == "RGB"
    white = mode in ("RGBA", "LA")
    assert image.picture.getpixel((0, 0)) == ((255, 255, 255) if white else (0, 0, 0))


async def test_a_photograph_is_turned_as_its_camera_says() -> None:
    file = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=turned)
    (image,) = await loaded(ImageLoader(ImageSettings()), [data_url(file.getvalue(), "jpeg")])
    assert image.picture.size == (4, 8)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,AAAA", "cannot be decoded"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png,AAAA", "neither a data URL"),
        ("data:text/plain;base64,AAAA", "neither a data URL"),
        ("file:///etc/passwd", "neither a data URL"),
        ("", "neither a data URL"),
        (data_url(encoded((32, 32))[:-30]), "cannot be decoded"),
        (data_url(encoded(kind="TIFF"), "tiff"), "cannot be decoded"),
        (data_url(encoded((101, 100))), "more pixels than this server's 10000"),
        (data_url(b"\0" * 3001), "more bytes than this server's 3000"),
    ],
)
async def test_what_is_refused(url: str, said: str) -> None:
    loader = ImageLoader(ImageSettings(max_bytes=3000, max_pixels=10_000))
    assert said in await refusal(loader, [url])


async def test_a_small_file_with_many_pixels_is_not_decoded() -> None:
    data = encoded((20_000, 20_000), mode="1")
    assert len(data) < 100_000
    assert "pixels" in await refusal(ImageLoader(ImageSettings()), [data_url(data)])


async def test_a_jpeg_of_many_scans_is_not_decoded() -> None:
    """Each takes a pass over all pixels and few bytes: 5,000 in 200 KB took 72 s."""
    data = encoded(kind="JPEG") + b"\xff\xda" * 100
    assert "scans" in await refusal(ImageLoader(ImageSettings()), [data_url(data, "jpeg")])


async def test_only_some_calls_have_pictures_at_once() -> None:
    """A file of 700 bytes can be a picture of 48 MiB."""
    loader, have, most = ImageLoader(ImageSettings()), 0, 0

    async def call() -> None:
        nonlocal have, most
        async with loader.loaded([data_url(encoded())] * 3) as images:
            have += len(images)
            most = max(most, have)
            await asyncio.sleep(0.001)
            have -= len(images)

    await asyncio.gather(*(call() for _ in range(20)))
    assert most <= 3 * DECODING_AT_ONCE


async def test_a_slow_host_keeps_no_data_urls_waiting(host: str) -> None:
    loader = fetching(fetch_timeout_s=20)
    slow = [
        asyncio.create_task(loaded(loader, [f"http://{host}/slow"]))
        for _ in range(2 * DECODING_AT_ONCE)
    ]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        assert await loaded(loader, [data_url(encoded())])
    for each in slow:
        each.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_request_has_a_number_of_images() -> None:
    loader = ImageLoader(ImageSettings(max_images=2))
    url = data_url(encoded())
    assert len(await loaded(loader, [url, url])) == 2
    assert "3 images, and this server takes 2" in await refusal(loader, [url] * 3)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1",
        "2002:7f00:1::", "ff02::1", "64:ff9b::a00:1", "::127.0.0.1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["a b", "http://x", "x:80", ""])
def test_a_host_that_is_none_is_no_setting(host: str) -> None:
    with pytest.raises(ValidationError, match="is not a host name"):
        ImageSettings(allowed_hosts=(host,))


@pytest.fixture
async def host() -> AsyncIterator[str]:
    """A web server with images, on loopback."""

    async def image(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(body=encoded())

    async def large(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(body=b"\0" * 5000)

    async def elsewhere(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=302, headers={"location": "/image"})

    async def slow(_: aiohttp.web.Request) -> aiohttp.web.Response:
        await asyncio.sleep(30)
        return aiohttp.web.Response()

    app = aiohttp.web.Application()
    for handler in (image, large, elsewhere, slow):
        app.router.add_get(f"/{handler.__name__}", handler)
    runner = aiohttp.web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def fetching(**settings: object) -> ImageLoader:
    known = {"allowed_hosts": ("127.0.0.1", "localhost"), "max_bytes": 3000, "fetch_timeout_s": 0.3}
    return ImageLoader(
        ImageSettings.model_validate({**known, **settings}), accepts_address=lambda _: True
    )


async def test_an_image_is_fetched_from_an_allowed_host(host: str) -> None:
    port = host.partition(":")[2]
    urls = [f"http://{host}/image", f"http://localhost:{port}/image?secret=1"]
    for image in await loaded(fetching(fetch_timeout_s=10), urls):
        assert image.picture.size == (8, 4)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("large", "more bytes than this server's 3000"),
        ("elsewhere", "answered 302"),
        ("slow", "within 0.3 s"),
        ("missing?secret=1", "answered 404"),
    ],
)
async def test_what_a_host_may_not_answer(host: str, path: str, said: str) -> None:
    found = await refusal(fetching(), [f"http://{host}/{path}"])
    assert said in found
    assert "secret" not in found


async def test_only_allowed_hosts_are_asked(host: str) -> None:
    loader = fetching(allowed_hosts=("images.example.com",))
    for url in (f"http://{host}/image", f"http://user:x@{host}/image", "http://[::1/x"):
        assert "Image 1" in await refusal(loader, [url])
    assert "does not fetch" in await refusal(fetching(), [f"http://user:x@{host}/image"])


async def test_an_allowed_name_with_a_private_address_is_refused(host: str) -> None:
    settings = ImageSettings(allowed_hosts=("127.0.0.1", "localhost"))
    loader = ImageLoader(settings)
    assert "is not a public address" in await refusal(loader, [f"http://{host}/image"])
    port = host.partition(":")[2]
    found = await refusal(loader, [f"http://localhost:{port}/image"])
    assert "its address is not a public one" in found


async def test_a_host_that_is_not_there(host: str) -> None:
    found = await refusal(fetching(fetch_timeout_s=5), ["http://127.0.0.1:9/image?secret=1"])
    assert "could not be fetched from 127.0.0.1: the connection failed." in found
