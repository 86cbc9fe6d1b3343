"""Run calibration rows through a model block by block, as block_loader.py loads them.

Called by output/convert.py and quality/sensitivity.py.
"""

# Shapes: R = calibration rows, T = tokens of a row, H = hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.quantize.calibration.activation_store import ActivationStore
from packhorse.quantize.calibration.block_loader import Block
from packhorse.quantize.calibration.hooks import (
    RANGE,
    InputRecorder,
    KeyValueRange,
    ResumeAtLastLayer,
    Scale,
    deduplicated,
    fast_matmul,
    hidden_states_of,
    register_recording_attention,
    run,
)
from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE, InputStatistics
from packhorse.quantize.errors import BadInput, Unsupported
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.experts import Experts, unfuse_experts
from packhorse.quantize.model.families import Family

Kind = Literal["quantized", "original"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def device_of(name: str) -> torch.device:
    """The device that blocks run on: `auto` is cuda where there is a GPU. Raises BadInput for a
    device that is not there.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if name not in ("cpu", "cuda"):
        raise BadInput(f"--device {name} is not known; give auto, cpu or cuda.")
    if name == "cuda" and not has_gpu:
        raise BadInput("--device cuda: torch finds no GPU here; leave it out, or give cpu.")
    return torch.device(name)


class Runner:
    """Carries the hidden states of all calibration rows from block to block, those of the original
    model and those of the quantized one. One block's weights are in memory at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        rows_RT: Tensor,
        device: torch.device,
        store: ActivationStore | None = None,
    ) -> None:
        """Compute the embeddings. Without a `store`, all activations stay in memory. Raises
        Unsupported for a model that is not laid out as a decoder with embeddings and blocks.
        """
        self.family = family
        self.device = device
        self.store = ActivationStore() if store is None else store
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config._attn_implementation = register_recording_attention(config)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        unfuse_experts(skeleton)
        decoder = skeleton.get_decoder()
        if not hasattr(decoder, "layers") or not hasattr(decoder, "embed_tokens"):
            raise Unsupported(f"{type(skeleton).__name__} is not laid out as expected.")
        embedding = checkpoint.get(
            f"{family.block_prefix.removesuffix('layers.')}embed_tokens.weight"
        )
        # Rotary embeddings have no weights: they compute their buffers when they are created.
        for name, module in list(decoder.named_children()):
            if name.startswith("rotary_emb"):
                setattr(decoder, name, type(module)(config=config).to(device))
        self._embed(decoder, embedding, device)
        self._blocks = decoder.layers
        self._skeleton, self._source = skeleton, checkpoint
        self.batches = 0
        self._keywords: list[list[dict[str, Any]]] = []
        self._record_first_inputs(decoder, rows_RT)

    @staticmethod
    def _embed(decoder: nn.Module, weight: Tensor, device: torch.device) -> None:
        made = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.to(device))
        # Gemma's embedding layer scales the embeddings.
        scale = getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0)
        # The embeddings that are looked up become float32, not the whole table.
        decoder.embed_tokens = nn.Sequential(made, Scale(scale))

    @torch.inference_mode()
    def _record_first_inputs(self, decoder: nn.Module, rows_RT: Tensor) -> None:
        """Run the decoder with recorders in place of its blocks. Arguments may differ from block to
        block: sliding windows, rotary embeddings.
        """
        recorders: list[InputRecorder] = [InputRecorder() for _ in self._blocks]
        self._keywords = [[] for _ in recorders]
        blocks, decoder.layers = self._blocks, nn.ModuleList(recorders)
        self._norm = decoder.get_submodule("norm")
        decoder.norm = nn.Identity()
        for rows in torch.split(rows_RT, max(1, TOKENS_AT_ONCE // rows_RT.shape[1])):
            decoder(input_ids=rows.to(self.device), use_cache=False)
            for kind in KINDS:
                self.put(kind, self.batches, recorders[0].hidden)
            for recorder, known in zip(recorders, self._keywords, strict=True):
                arguments = recorder.keywords
                known.append(deduplicated(arguments, known[-1]) if known else arguments)
            self.batches += 1
        decoder.layers, decoder.embed_tokens = blocks, nn.Identity()

    def hidden(self, kind: Kind, number: int) -> Tensor:
        """The hidden states of a batch before the current block, in the quantized or the original
        model. `record_original` moves those of the original behind the block.
        """
        return self.store.get((kind, number))

    def put(self, kind: Kind, number: int, hidden: Tensor) -> None:
        self.store.put((kind, number), hidden)

    def state(self) -> Iterator[dict[str, Tensor]]:
        """All hidden states by batch, for `restore`."""
        for number in range(self.batches):
            yield {kind: self.hidden(kind, number) for kind in KINDS}

    def restore(self, state: Iterable[dict[str, Tensor]]) -> None:
        """Set the hidden states that `state` returned for the same rows."""
        for number, hidden in enumerate(state):
            for kind in KINDS:
                # A copy: in a file the tensor may have another alignment, and matrix products over
                # it sum in another order.
                self.put(kind, number, hidden[kind].clone().to(self.device))

    def enter(self, block: Block) -> RunningBlock:
        """The block with its weights, in float32 on the device. Raises BadInput when its tensors do
        not fit the config, Unsupported for a block with buffers.
        """
        module = self._blocks[block.index]
        weights = {
            self.family.in_module(name.removeprefix(block.prefix)): tensor.to(
                self.device, torch.float32, copy=True
            )
            for name, tensor in block.tensors.items()
        }
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise BadInput(f"Block {block.index} is not as the config says: {error}") from error
        if next(module.buffers(), None) is not None:
            raise Unsupported(f"Block {block.index} has buffers, which are not in the checkpoint.")
        module.eval().requires_grad_(requires_grad=False)
        dtypes = {name: tensor.dtype for name, tensor in block.tensors.items()}
        return RunningBlock(self, block.index, module, block.prefix, dtypes)

    @torch.inference_mode()
    def leave(self, live: RunningBlock) -> None:
        """Compute the quantized model's hidden states behind the block, and free the block. Raises
        BadInput when they are not finite.
        """
        for number in range(self.batches):
            output = live.output(number)
            if not output.isfinite().all():
                raise BadInput(
                    f"Block {live.index} puts out NaN or infinity on the calibration text."
                )
            self.put("quantized", number, output)
            del output  # would be in memory beside the next one
        self._blocks[live.index] = nn.Identity()
        self._keywords[live.index] = []
        live.free()

    def head(self) -> Callable[[Tensor], Tensor]:
        """A function from hidden states behind the last block to logits. Reads the head."""
        source, model = self._source, self._skeleton
        base = self.family.block_prefix.removesuffix("layers.")
        linear, norm = model.get_output_embeddings(), self._norm.to_empty(device=self.device)
        norm.load_state_dict({"weight": source.get(f"{base}norm.weight").float()})
        named = "lm_head.weight" if "lm_head.weight" in source else f"{base}embed_tokens.weight"
        weight = source.get(named).to(self.device, torch.float32, copy=True)
        linear.load_state_dict({"weight": weight}, assign=True)
        cap = getattr(model.config, "final_logit_softcapping", None)

        def logits(hidden: Tensor) -> Tensor:
            found: Tensor = linear(norm(hidden))
            return cap * torch.tanh(found / cap) if cap else found

        return logits

    def keywords(self, index: int, number: int) -> dict[str, Any]:
        """The arguments of block `index` on a batch besides the hidden states."""
        return self._keywords[index][number]


@dataclass
class RunningBlock:
    """A decoder block in memory, with float32 weights that may be changed in place."""

    runner: Runner
    index: int
    module: nn.Module
    prefix: str
    dtypes: dict[str, torch.dtype]
    """The dtypes of the block's tensors on disk, by full name."""

    def tensor(self, name: str) -> Tensor:
        """A parameter, by its name within the block; not a copy."""
        return self.module.get_parameter(name).data

    def weight(self, layer: str) -> Tensor:
        """A layer's weight, float32 (O, I); not a copy."""
        return self.tensor(f"{layer}.weight")

    @property
    def names(self) -> set[str]:
        """The names of the block's parameters, within the block."""
        return {name for name, _ in self.module.named_parameters()}

    def through(self, hidden: Tensor, number: int) -> Tensor:
        """The block's output for any hidden states of batch `number`'s shape."""
        return hidden_states_of(self.module(hidden, **self.runner.keywords(self.index, number)))

    def output(self, number: int) -> Tensor:
        """The block's output for a batch of the quantized model's hidden states."""
        with fast_matmul():
            return self.through(self.runner.hidden("quantized", number), number)

    @torch.inference_mode()
    def statistics(self, groups: Sequence[tuple[str, ...]]) -> dict[str, InputStatistics]:
        """Input statistics of groups of layers, with magnitudes, by each group's first layer. Runs
        the block on the quantized model's hidden states.
        """
        found = {group[0]: InputStatistics() for group in groups}
        for number in range(self.runner.batches):
            hidden = self.runner.hidden("quantized", number)
            keywords = self.runner.keywords(self.index, number)
            with _count_expert_tokens(self.module), fast_matmul():
                x, _ = run(self.module, set(found), hidden, keywords, last=groups[-1][0])
                for name, statistics in found.items():
                    statistics.add(x[name])
        return found

    @torch.inference_mode()
    def key_value_range(self) -> tuple[float, float]:
        """The largest magnitude of the keys (after rotary embedding) and of the values that the
        block computes on all rows.
        """
        found = KeyValueRange()
        attentions = [
            part for part in self.module.modules() if hasattr(part, "num_key_value_groups")
        ]
        for part in attentions:
            setattr(part, RANGE, found)
        for number in range(self.runner.batches):
            self.through(self.runner.hidden("quantized", number), number)
        for part in attentions:
            delattr(part, RANGE)
        return found.key, found.value

    @torch.inference_mode()
    def record_original(self, groups: Sequence[tuple[str, ...]]) -> QuantizingBlock:
        """Run the block as it is on the original model's hidden states, and record the inputs of
        these groups. Experts cannot be recorded: the two models may send a token to different ones.

        The result is this block, whose layers are quantized from here on. The runner's hidden
        states of the original model move behind the block.
        """
        recorded = {group[0] for group in groups}
        recorded |= {norm for layer, norm in self.runner.family.residuals if layer in recorded}
        with _count_expert_tokens(self.module) as experts:
            for number in range(self.runner.batches):
                hidden = self.runner.hidden("original", number)
                keywords = self.runner.keywords(self.index, number)
                with fast_matmul():
                    seen, output = run(self.module, recorded, hidden, keywords)
                for name, tensor in seen.items():
                    # bfloat16 takes half the memory; its rounding is noise beside the deviations.
                    key = ("recorded", number, name)
                    self.runner.store.put(key, tensor.bfloat16())
                self.runner.put("original", number, output)
        expert_tokens = list(experts.tokens) if experts else []
        return QuantizingBlock(
            self.runner, self.index, self.module, self.prefix, self.dtypes, recorded, expert_tokens
        )

    def free(self) -> None:
        """Drop the weights."""
        self.module = nn.Identity()


@dataclass
class QuantizingBlock(RunningBlock):
    """A block whose layers become quantized one by one, in the order in which a token meets them.

    Its statistics tell how the layers' inputs deviate from the original model's.
    """

    recorded: set[str]
    """The layers and norms whose inputs in the original block are in the activation store, under
    ("recorded", batch, name)."""
    expert_tokens: list[int]
    """The tokens that the original block sent to each expert; empty without experts."""
    _resumable: set[str] = field(default_factory=set)
    """Last layers of attention and MLP whose inputs are final, as all layers before them are
    quantized. The activation store has these inputs under ("last", layer, batch), in bfloat16, as
    most engines compute them."""

    def output(self, number: int) -> Tensor:
        hidden = self.runner.hidden("quantized", number)
        with self._resumed(number), fast_matmul():
            return self.through(hidden, number)

    @torch.inference_mode()
    def statistics(self, groups: Sequence[tuple[str, ...]]) -> dict[str, InputStatistics]:
        """Input statistics of groups of layers, with deviations from the original where its inputs
        were recorded, by each group's first layer. Deletes these recordings: a second call for the
        same group raises KeyError.
        """
        found = {group[0]: InputStatistics(magnitudes=False) for group in groups}
        last = groups[-1][0]
        is_final = len(groups) == 1 and last in (layer for _, layer in self.runner.family.parts)
        for number in range(self.runner.batches):
            self._add_batch(groups, found, number, keep_last=is_final)
        if is_final:
            self._resumable.add(last)
        return found

    def _add_batch(
        self,
        groups: Sequence[tuple[str, ...]],
        found: dict[str, InputStatistics],
        number: int,
        *,
        keep_last: bool,
    ) -> None:
        """Add one batch. With `keep_last`, also store the inputs of the last group's layer."""
        norm_of = dict(self.runner.family.residuals)
        watched = {*found, *(norm_of[name] for name in found if name in norm_of)}
        hidden, last = self.runner.hidden("quantized", number), groups[-1][0]
        keywords = self.runner.keywords(self.index, number)
        with self._resumed(number), _count_expert_tokens(self.module), fast_matmul():
            x, _ = run(self.module, watched, hidden, keywords, last=last)
            for group in groups:
                name, deviation, residual = group[0], None, None
                if name in self.recorded:
                    deviation = self._deviation(name, number, x)
                if deviation is not None and len(group) == 1:
                    residual, deviation = deviation @ self.weight(name).T, None
                    if norm := norm_of.get(name):
                        residual += self._deviation(norm, number, x)
                found[name].add(x[name], deviation, residual)
        if keep_last:
            self.runner.store.put(("last", last, number), x[last].bfloat16())

    def _deviation(self, name: str, number: int, x: dict[str, Tensor]) -> Tensor:
        """The original's input of a layer or norm minus this block's. Deletes the recording."""
        key = ("recorded", number, name)
        y = self.runner.store.get(key)
        self.runner.store.drop(*key)
        return y - x[name]

    @contextmanager
    def _resumed(self, number: int) -> Iterator[None]:
        """Within, attention and MLP start at their last layer where its input is stored."""
        changed = []
        for part, layer in self.runner.family.parts:
            if layer in self._resumable:
                module, end = self.module.get_submodule(part), self.module.get_submodule(layer)
                stored = self.runner.store.get(("last", layer, number)).float()
                module.forward = ResumeAtLastLayer(end, stored, tupled=part == "self_attn")
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    def free(self) -> None:
        """Drop the weights, the recordings and the stored inputs."""
        super().free()
        self.runner.store.drop("recorded")
        self.runner.store.drop("last")


@contextmanager
def _count_expert_tokens(module: nn.Module) -> Iterator[Experts | None]:
    """Within, the block's experts see a sample of all tokens and count their own. None for a block
    without experts.
    """
    found = next((part for part in module.modules() if isinstance(part, Experts)), None)
    if found is None:
        yield None
        return
    found.is_recorded, found.tokens = True, [0] * len(found)
    try:
        yield found
    finally:
        found.is_recorded = False
