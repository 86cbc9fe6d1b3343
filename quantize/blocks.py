"""Walk a checkpoint one decoder block at a time, so that memory does not grow with depth; and run
calibration rows through the blocks as the walk reaches them.

What is outside the blocks (embeddings, final norm, head) comes first, as block -1, and is never
quantized.
"""

# Shapes: R = calibration rows, T = tokens of a row, H = hidden size.

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput, Unsupported
from quantize.families import Family
from quantize.inputs import Inputs

TOKENS_AT_ONCE = 4096
RANGE = "packhorse_range"  # where an attention module that is watched has its _KeyValueRange


@dataclass(frozen=True)
class Block:
    """One decoder block: its tensors by full name, read from disk when the walk reaches it."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]


def count_blocks(checkpoint: Checkpoint, family: Family) -> int:
    """How many decoder blocks the tensors on disk make; the planner has seen that all are there."""
    return 1 + max(_index_of(name, family) for name in checkpoint.names())


def walk(checkpoint: Checkpoint, family: Family) -> Iterator[Block]:
    """Block -1 (everything outside), then 0, 1, ...; each is freed when the caller moves on."""
    names: dict[int, list[str]] = {
        index: [] for index in range(-1, count_blocks(checkpoint, family))
    }
    for name in checkpoint.names():
        if not name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; it is computed now
            names[_index_of(name, family)].append(name)
    for index, members in names.items():
        prefix = f"{family.block_prefix}{index}." if index >= 0 else ""
        yield Block(index, prefix, {name: checkpoint.get(name) for name in members})


def _index_of(name: str, family: Family) -> int:
    if not name.startswith(family.block_prefix):
        return -1
    return int(name.removeprefix(family.block_prefix).split(".", 1)[0])


class Runner:
    """Carries the hidden states of all calibration rows from block to block, twice: as the original
    model has them and as the quantized one has. Only one block's weights are in memory at a time.
    """

    def __init__(
        self, checkpoint: Checkpoint, family: Family, rows_RT: Tensor, device: torch.device
    ) -> None:
        """Runs what is before the blocks. Raises Unsupported for a model laid out differently."""
        self.family = family
        self.device = device
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config._attn_implementation = _watch_attention(config)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        decoder = skeleton.get_decoder()
        if not hasattr(decoder, "layers") or not hasattr(decoder, "embed_tokens"):
            raise Unsupported(f"{type(skeleton).__name__} is not laid out as expected.")
        embedding = checkpoint.get(
            f"{family.block_prefix.removesuffix('layers.')}embed_tokens.weight"
        )
        # Modules without weights of their own (rotary embeddings) compute their buffers when made.
        for name, module in list(decoder.named_children()):
            if name.startswith("rotary_emb"):
                setattr(decoder, name, type(module)(config=config).to(device))
        self._embed(decoder, embedding.float(), device)
        self._blocks = decoder.layers
        self.quantized: list[Tensor] = []
        """Hidden states before the current block, a batch of rows each, as the quantized blocks
        before it make them."""
        self.original: list[Tensor] = []
        """The same of the original; behind it once the block's `keep_original` was called."""
        self._keywords: list[list[dict[str, Any]]] = []
        self._see_first_inputs(decoder, rows_RT)

    @staticmethod
    def _embed(decoder: nn.Module, weight: Tensor, device: torch.device) -> None:
        made = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.to(device))
        # Gemma's embedding layer scales what it looks up.
        scale = getattr(decoder.embed_tokens, "scalar_embed_scale", None)
        decoder.embed_tokens = nn.Sequential(made, _Times(scale)) if scale is not None else made

    @torch.inference_mode()
    def _see_first_inputs(self, decoder: nn.Module, rows_RT: Tensor) -> None:
        """Run the decoder with blocks that only note what they are called with, which may differ
        from block to block: sliding windows, rotary embeddings.
        """
        notes: list[_Note] = [_Note() for _ in self._blocks]
        blocks, decoder.layers = self._blocks, nn.ModuleList(notes)
        decoder.norm = nn.Identity()
        for rows in torch.split(rows_RT, max(1, TOKENS_AT_ONCE // rows_RT.shape[1])):
            decoder(input_ids=rows.to(self.device), use_cache=False)
        decoder.layers = blocks
        self.quantized = [seen for seen, _ in notes[0].calls]
        self.original = list(self.quantized)
        self._keywords = [[keywords for _, keywords in note.calls] for note in notes]

    def enter(self, block: Block) -> LiveBlock:
        """The block with its weights, in float32 on the device."""
        module = self._blocks[block.index].to_empty(device=self.device)
        weights = {name.removeprefix(block.prefix): t.float() for name, t in block.tensors.items()}
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise BadInput(f"Block {block.index} is not as the config says: {error}") from error
        if next(module.buffers(), None) is not None:
            raise Unsupported(f"Block {block.index} has buffers, which are not in the checkpoint.")
        module.eval().requires_grad_(requires_grad=False)
        return LiveBlock(self, block.index, module)

    @torch.inference_mode()
    def leave(self, live: LiveBlock) -> None:
        """Make the block's outputs the next one's inputs, and free it. Raises BadInput when they
        are not finite.
        """
        for number in range(len(self.quantized)):
            output = live.output(number)
            if not output.isfinite().all():
                raise BadInput(
                    f"Block {live.index} puts out NaN or infinity on the calibration text."
                )
            self.quantized[number] = output
        self._blocks[live.index] = nn.Identity()
        self._keywords[live.index] = []
        live.free()

    def keywords(self, index: int) -> list[dict[str, Any]]:
        return self._keywords[index]


@dataclass
class LiveBlock:
    """A block that runs. `module` becomes the quantized block, layer by layer."""

    runner: Runner
    index: int
    module: nn.Module
    _seen: list[dict[str, Tensor]] = field(default_factory=list)
    """By batch: what the original's layers are given."""
    _reached: dict[str, list[Tensor]] = field(default_factory=dict)
    """By the last layer of a part of the block: what it is given, batch by batch, once all before
    it is quantized."""

    def tensor(self, name: str) -> Tensor:
        """A parameter of the quantized block, by its name within the block."""
        return self.module.get_parameter(name).data

    def weight(self, layer: str) -> Tensor:
        """float32 (O, I)."""
        return self.tensor(f"{layer}.weight")

    @torch.inference_mode()
    def keep_original(self) -> None:
        """Run the block as it is on what the original model gives it, and note what its layers are
        given; from here on changes are to the quantized block only.
        """
        family = self.runner.family
        watched = {name for names in family.residuals for name in names}
        watched |= {group[0] for group in family.fused}
        keywords = self.runner.keywords(self.index)
        for number, more in enumerate(keywords):
            with fast_products():
                seen, output = _run(self.module, watched, self.runner.original[number], more)
            # Half the memory; what is lost is noise against the differences of interest.
            self._seen.append({name: tensor.bfloat16() for name, tensor in seen.items()})
            self.runner.original[number] = output

    @torch.inference_mode()
    def inputs(self, groups: Sequence[tuple[str, ...]]) -> dict[str, Inputs]:
        """What groups of layers are given by the block as it is now, by the first layer's name.
        Before keep_original with their magnitudes, for `prepare`; after it with how they differ
        from what the original gives them.
        """
        kept = bool(self._seen)
        found = {group[0]: Inputs(magnitudes=not kept) for group in groups}
        residual_of = dict(self.runner.family.residuals) if kept else {}
        watched = {*found, *(residual_of[name] for name in found if name in residual_of)}
        last = groups[-1][0]
        ends = {layer for _, layer in self.runner.family.parts} if len(groups) == 1 else set()
        reached: list[Tensor] = []
        for number, keywords in enumerate(self.runner.keywords(self.index)):
            hidden = self.runner.quantized[number]
            with self._continued(number), fast_products():
                x, _ = _run(self.module, watched, hidden, keywords, last=last)
                y = self._seen[number] if kept else {}
                for name, inputs in found.items():
                    norm = residual_of.get(name)
                    inputs.add(x[name], y.get(name), y[norm] - x[norm] if norm else None)
            if last in ends:
                reached.append(x[last])
        if reached:
            self._reached[last] = reached
        return found

    def free(self) -> None:
        """Let go of the weights and of all that was kept."""
        self.module = nn.Identity()
        self._seen, self._reached = [], {}

    def output(self, number: int) -> Tensor:
        """What the block as it is now puts out for a batch."""
        keywords = self.runner.keywords(self.index)[number]
        with self._continued(number), fast_products():
            return _hidden(self.module(self.runner.quantized[number], **keywords))

    @contextmanager
    def _continued(self, number: int) -> Iterator[None]:
        """Parts whose last layer has been reached start there, for this batch."""
        changed = []
        for part, layer in self.runner.family.parts:
            if layer in self._reached:
                module, end = self.module.get_submodule(part), self.module.get_submodule(layer)
                kept = self._reached[layer][number]
                module.forward = _Continue(end, kept, tupled=part == "self_attn")
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    @torch.inference_mode()
    def key_value_range(self) -> tuple[float, float]:
        """The largest magnitude of the keys (after their rotation) and of the values that the
        quantized block computes on all rows.
        """
        seen = _KeyValueRange()
        attentions = [
            part for part in self.module.modules() if hasattr(part, "num_key_value_groups")
        ]
        for part in attentions:
            setattr(part, RANGE, seen)
        for x, keywords in zip(
            self.runner.quantized, self.runner.keywords(self.index), strict=True
        ):
            self.module(x, **keywords)
        for part in attentions:
            delattr(part, RANGE)
        return seen.key, seen.value


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 matrices may round their factors to bfloat16 (CPUs with AMX) or TF32
    (GPUs); sums stay float32. The model is served in that precision, and statistics need no more;
    the solvers run outside.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Reached(Exception):
    """Ends a run where nothing behind is wanted."""


def _run(
    module: nn.Module,
    watched: set[str],
    hidden: Tensor,
    keywords: dict[str, Any],
    *,
    last: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What the watched parts of a block are given, and what the block puts out. The run ends at the
    part `last`, and then the output is not one.
    """
    seen: dict[str, Tensor] = {}
    output = hidden
    with ExitStack() as hooks:
        for name in watched:

            def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = inputs[0]
                if name == last:
                    raise _Reached

            handle = module.get_submodule(name).register_forward_pre_hook(see)
            hooks.callback(handle.remove)
        with suppress(_Reached):
            output = _hidden(module(hidden, **keywords))
    return seen, output


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass
class _Continue:
    """In place of a module's forward: its last layer on what that is given."""

    layer: nn.Module
    given: Tensor
    tupled: bool

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        output = self.layer(self.given)
        return (output, None) if self.tupled else output


class _Note(nn.Module):
    """In a block's place: passes its input on and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
        self.calls.append((hidden_states, keywords))
        return hidden_states


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self._factor


@dataclass
class _KeyValueRange:
    key: float = 0.0
    value: float = 0.0


def _watch_attention(config: Any) -> str:
    """The name of an attention that notes the range of keys and values where it is asked to: like
    sdpa, or where scores are capped (Gemma 2), which sdpa does not know, like the model's own.
    """
    kind = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    name = f"packhorse_{kind}"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Any:
        seen: _KeyValueRange | None = getattr(module, RANGE, None)
        if seen is not None:
            seen.key = max(seen.key, key.abs().amax().item())
            seen.value = max(seen.value, value.abs().amax().item())
        if kind == "eager":
            own: Any = sys.modules[type(module).__module__]
            return own.eager_attention_forward(module, query, key, value, *args, **more)
        if torch.get_float32_matmul_precision() == "medium":  # in fast_products
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **more)
        return output.float(), weights

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name
