"""Images in chat on the real engine, with a tiny model that this repository makes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from PIL import Image
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from tests.conftest import Server, running_server
from tests.e2e.vision_model import PLACE_TOKENS, SIDE, make_model

WORDS = "What is it?"


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def vision_server(vision_folder: Path) -> Iterator[Server]:
    # Exact, so that the original's answers are known.
    arguments = (str(vision_folder), "--served-model-name", "vision", "--dtype", "float32")
    with running_server(vision_folder.parent, *arguments, cache=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(vision_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{vision_server.url}/v1", api_key="none", max_retries=0)


def picture(*colour: int) -> Image.Image:
    """Two halves, so that the processor's scaling changes nothing."""
    made = Image.new("RGB", (SIDE, SIDE), colour)
    made.paste((255, 255, 255), (0, 0, SIDE // 2, SIDE))
    return made


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def message(*images: Image.Image) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": WORDS}]}


def ask(client: OpenAI, *images: Image.Image, **fields: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model="vision", messages=[message(*images)], max_tokens=8, temperature=0, **fields
    )


RED, BLUE = picture(250, 0, 0), picture(0, 0, 250)


@pytest.fixture(scope="module")
def original(vision_folder: Path) -> Any:
    """What transformers answers to the same conversation."""
    model = Idefics3ForConditionalGeneration.from_pretrained(vision_folder).eval()
    processor = Idefics3Processor.from_pretrained(vision_folder)

    def answer(*images: Image.Image) -> str:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": WORDS}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=list(images), return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        said: str = processor.tokenizer.decode(new, skip_special_tokens=True)
        return said

    return answer


@pytest.mark.parametrize("images", [(RED,), (BLUE,), (RED, BLUE)], ids=["red", "blue", "both"])
def test_the_answer_is_transformers_own(client: OpenAI, original: Any, images: Any) -> None:
    said = ask(client, *images).parse().choices[0].message.content
    assert said == original(*images)


def test_an_image_is_a_part_of_the_prompt(client: OpenAI) -> None:
    red, blue = ask(client, RED).parse(), ask(client, BLUE).parse()
    assert red.choices[0].message.content != blue.choices[0].message.content
    text = client.chat.completions.create(
        model="vision", messages=[{"role": "user", "content": WORDS}], max_tokens=1
    )
    assert red.usage.prompt_tokens == text.usage.prompt_tokens + PLACE_TOKENS


def test_the_result_cache_tells_images_apart(client: OpenAI) -> None:
    """Their token ids are the same: places for what the vision tower will say."""
    one, other = picture(9, 9, 9), picture(200, 200, 9)
    statuses = [ask(client, image).headers["x-packhorse-cache"] for image in (one, other, one)]
    assert statuses == ["miss", "miss", "hit"]


def test_a_stream_says_the_same(client: OpenAI) -> None:
    whole = ask(client, RED).parse().choices[0].message.content
    stream = client.chat.completions.create(
        model="vision",
        messages=[message(RED)],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"cache": {"mode": "off"}},
    )
    assert "".join(event.choices[0].delta.content or "" for event in stream) == whole


def test_what_has_no_effect_is_told(client: OpenAI) -> None:
    sent = message(RED)
    sent["content"][0]["image_url"]["detail"] = "low"
    answer = client.chat.completions.with_raw_response.create(
        model="vision", messages=[sent], max_tokens=1
    )
    assert answer.headers["x-packhorse-ignored"] == "messages.content.image_url.detail"


def test_tokens_of_a_conversation_with_an_image(vision_server: Server) -> None:
    body = {"model": "vision", "messages": [message(RED)]}
    counted = httpx.post(f"{vision_server.url}/tokenize", json=body).json()["count"]
    body = {"model": "vision", "messages": [{"role": "user", "content": WORDS}]}
    assert (
        counted
        == httpx.post(f"{vision_server.url}/tokenize", json=body).json()["count"] + PLACE_TOKENS
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1/x.png", "does not fetch images from this host"),
        ("data:image/png;base64,AAAA", "cannot be decoded"),
    ],
)
def test_a_bad_image_is_the_callers_fault(client: OpenAI, url: str, said: str) -> None:
    sent: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    with pytest.raises(BadRequestError, match=said):
        client.chat.completions.create(model="vision", messages=[sent])


def test_what_would_cut_an_image_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="could cut an image"):
        ask(client, RED, extra_body={"truncate_prompt_tokens": 4})


def test_a_text_model_reads_no_images(demo_server: Server) -> None:
    client = OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(BadRequestError, match="reads text alone"):
        client.chat.completions.create(model="demo", messages=[message(RED)])
