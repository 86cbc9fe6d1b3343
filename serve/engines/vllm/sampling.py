"""A request's sampling fields as vLLM's SamplingParams."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from packhorse.serve.engines.base import TOO_LONG
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import EffectiveSampling, GenerateRequest

# Fields that None leaves to the model's generation_config.json.
OPTIONAL = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "logprobs", "prompt_logprobs",
)  # fmt: skip
# Fields that are passed on when they are true or above 0.
WHEN_SET = ("min_tokens", "ignore_eos", "include_stop_str_in_output")
LISTS = ("stop", "bad_words", "allowed_token_ids")


def sampling_params(
    request: GenerateRequest,
    *,
    max_tokens: int,
    defaults: dict[str, Any],
    structured: StructuredOutputsParams | None,
) -> SamplingParams:
    """vLLM's parameters: the request's over the model's own `defaults` over vLLM's.

    Raises Invalid, in vLLM's own words where it is vLLM that refuses.
    """
    sampling = request.sampling
    given: dict[str, Any] = dict(defaults)
    for name in OPTIONAL:
        if (value := getattr(sampling, name)) is not None:
            given[name] = value
    for name in WHEN_SET:
        if value := getattr(sampling, name):
            given[name] = value
    for name in LISTS:
        if (values := getattr(sampling, name)) is not None:
            given[name] = list(values)
    if sampling.stop_token_ids:
        given["stop_token_ids"] = [*sampling.stop_token_ids, *defaults.get("stop_token_ids", ())]
    if sampling.logit_bias:
        given["logit_bias"] = dict(sampling.logit_bias)
    try:
        return SamplingParams(
            **given,
            n=sampling.n,
            max_tokens=max_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            structured_outputs=structured,
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request alone
        )
    except (ValueError, VLLMClientError) as error:
        raise invalid(error) from error


def effective_sampling(params: SamplingParams) -> EffectiveSampling:
    """The values that vLLM uses for the fields that models have defaults for. At temperature 0 it
    sets fields without effect to their neutral values.
    """
    return EffectiveSampling(
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        params.seed,
    )


def invalid(error: Exception, param: str | None = None) -> Invalid:
    """vLLM's refusal as ours. Its first argument alone: str() appends a value, which may be the
    prompt.
    """
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        message = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}."
    else:
        message = str(error.args[0]) if error.args else type(error).__name__
    if message.startswith("This model's maximum context length"):
        return Invalid(f"{TOO_LONG}: {message}", param=param, code="context_length_exceeded")
    return Invalid(message, param=getattr(error, "parameter", None) or param)
