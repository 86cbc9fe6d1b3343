"""Run calibration rows through the blocks of a model as a walk over it reaches them."""

# Shapes: R = calibration rows, T = tokens of a row, H = hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from packhorse.quantize.calibration.activation_store import Shelf
from packhorse.quantize.calibration.block_loader import Block
from packhorse.quantize.calibration.hooks import (
    RANGE,
    Continue,
    KeyValueRange,
    Note,
    Times,
    fast_products,
    hidden_of,
    run,
    shared,
    watch_attention,
)
from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE, Inputs
from packhorse.quantize.errors import BadInput, Unsupported
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.experts import Experts, take_apart
from packhorse.quantize.model.families import Family
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

Kind = Literal["quantized", "original"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Runner:
    """Carries the hidden states of all calibration rows from block to block, twice: as the original
    model has them and as the quantized one has. Only one block's weights are in memory at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        rows_RT: Tensor,
        device: torch.device,
        shelf: Shelf | None = None,
    ) -> None:
        """Runs what is before the blocks. `shelf` None: all stays in memory. Raises Unsupported for
        a model laid out differently.
        """
        self.family = family
        self.device = device
        self.shelf = Shelf() if shelf is None else shelf
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config._attn_implementation = watch_attention(config)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        take_apart(skeleton)
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
        self._embed(decoder, embedding, device)
        self._blocks = decoder.layers
        self._skeleton, self._source = skeleton, checkpoint
        self.batches = 0
        self._keywords: list[list[dict[str, Any]]] = []
        self._see_first_inputs(decoder, rows_RT)

    @staticmethod
    def _embed(decoder: nn.Module, weight: Tensor, device: torch.device) -> None:
        made = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.to(device))
        # Gemma's embedding layer scales what it looks up.
        scale = getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0)
        # What is looked up becomes float32, not the whole table.
        decoder.embed_tokens = nn.Sequential(made, Times(scale))

    @torch.inference_mode()
    def _see_first_inputs(self, decoder: nn.Module, rows_RT: Tensor) -> None:
        """Run the decoder with blocks that only note what they are called with, which may differ
        from block to block: sliding windows, rotary embeddings.
        """
        notes: list[Note] = [Note() for _ in self._blocks]
        self._keywords = [[] for _ in notes]
        blocks, decoder.layers = self._blocks, nn.ModuleList(notes)
        self._norm = decoder.get_submodule("norm")
        decoder.norm = nn.Identity()
        for rows in torch.split(rows_RT, max(1, TOKENS_AT_ONCE // rows_RT.shape[1])):
            decoder(input_ids=rows.to(self.device), use_cache=False)
            for kind in KINDS:
                self.put(kind, self.batches, notes[0].hidden)
            for note, known in zip(notes, self._keywords, strict=True):
                known.append(shared(note.keywords, known[-1]) if known else note.keywords)
            self.batches += 1
        decoder.layers, decoder.embed_tokens = blocks, nn.Identity()

    def hidden(self, kind: Kind, number: int) -> Tensor:
        """The hidden states of a batch of rows before the current block, as the quantized blocks
        before it make them, or as the original has them. Those of the original are behind the block
        once its `keep_original` was called.
        """
        return self.shelf.get((kind, number))

    def put(self, kind: Kind, number: int, hidden: Tensor) -> None:
        self.shelf.put((kind, number), hidden)

    def state(self) -> Iterator[dict[str, Tensor]]:
        """All hidden states, batch by batch, for `restore`."""
        for number in range(self.batches):
            yield {kind: self.hidden(kind, number) for kind in KINDS}

    def restore(self, state: Iterable[dict[str, Tensor]]) -> None:
        """Go on from where `state` was called, on the same rows; from the beginning without any."""
        for number, hidden in enumerate(state):
            for kind in KINDS:
                # A copy: what is read from a file may lie on other boundaries, and sum differently.
                self.put(kind, number, hidden[kind].clone().to(self.device))

    def enter(self, block: Block) -> LiveBlock:
        """The block with its weights, in float32 on the device."""
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
        return LiveBlock(self, block.index, module, block.prefix, dtypes)

    @torch.inference_mode()
    def leave(self, live: LiveBlock) -> None:
        """Make the block's outputs the next one's inputs, and free it. Raises BadInput when they
        are not finite.
        """
        for number in range(self.batches):
            output = live.output(number)
            if not output.isfinite().all():
                raise BadInput(
                    f"Block {live.index} puts out NaN or infinity on the calibration text."
                )
            self.put("quantized", number, output)
            del output  # not to be held beside the next one
        self._blocks[live.index] = nn.Identity()
        self._keywords[live.index] = []
        live.free()

    def head(self) -> Callable[[Tensor], Tensor]:
        """From hidden states behind the last block to logits. Reads the head's weights."""
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
        """What block `index` is called with on a batch, besides hidden states."""
        return self._keywords[index][number]


@dataclass
class LiveBlock:
    """A block that runs. `module` becomes the quantized block, layer by layer."""

    runner: Runner
    index: int
    module: nn.Module
    prefix: str
    dtypes: dict[str, torch.dtype]
    """Of the block's tensors on disk, by full name."""
    _seen: set[str] = field(default_factory=set)
    """The layers and norms for which the shelf has what the original's are given: ("seen", batch,
    name). Not experts: the two models may choose different ones for a token."""
    expert_tokens: list[int] = field(default_factory=list)
    """Sent to each expert by the original; empty where there are none."""
    _reached: set[str] = field(default_factory=set)
    """The last layers of parts of the block that have all before them quantized: the shelf has what
    they are given, ("reached", layer, batch), in bfloat16, as most engines have it."""

    def tensor(self, name: str) -> Tensor:
        """A parameter of the quantized block, by its name within the block."""
        return self.module.get_parameter(name).data

    def weight(self, layer: str) -> Tensor:
        """float32 (O, I)."""
        return self.tensor(f"{layer}.weight")

    @torch.inference_mode()
    def keep_original(self, groups: Sequence[tuple[str, ...]]) -> None:
        """Run the block as it is on what the original model gives it, and note what these groups
        are given (experts are no use), for `inputs` of each; from here on changes are to the
        quantized block only.
        """
        watched = {group[0] for group in groups}
        watched |= {norm for layer, norm in self.runner.family.residuals if layer in watched}
        with self._watched_experts() as experts:
            for number in range(self.runner.batches):
                self._note_original(watched, number)
        self._seen = watched
        self.expert_tokens = list(experts.tokens) if experts else []

    def _note_original(self, watched: set[str], number: int) -> None:
        hidden = self.runner.hidden("original", number)
        keywords = self.runner.keywords(self.index, number)
        with fast_products():
            seen, output = run(self.module, watched, hidden, keywords)
        for name, tensor in seen.items():
            # Half the memory; what is lost is noise against the differences of interest.
            self.runner.shelf.put(("seen", number, name), tensor.bfloat16())
        self.runner.put("original", number, output)

    def through(self, hidden: Tensor, number: int) -> Tensor:
        """What the block as it is now makes of any hidden states in the place of a batch."""
        return hidden_of(self.module(hidden, **self.runner.keywords(self.index, number)))

    @property
    def names(self) -> set[str]:
        """Of the block's tensors."""
        return {name for name, _ in self.module.named_parameters()}

    @contextmanager
    def _watched_experts(self) -> Iterator[Experts | None]:
        found = next((part for part in self.module.modules() if isinstance(part, Experts)), None)
        if found is None:
            yield None
            return
        found.is_watched, found.tokens = True, [0] * len(found)
        try:
            yield found
        finally:
            found.is_watched = False

    @torch.inference_mode()
    def inputs(self, groups: Sequence[tuple[str, ...]]) -> dict[str, Inputs]:
        """What groups of layers are given by the block as it is now, by the first layer's name.
        Before keep_original with their magnitudes, for `prepare`. After it with how they differ
        from what the original gives them, which is not kept any longer: then a group has one look,
        and a second is a KeyError.
        """
        found = {group[0]: Inputs(magnitudes=not self._seen) for group in groups}
        last = groups[-1][0]
        # Before keep_original, what is before a part's last layer may still change.
        at_an_end = bool(self._seen) and len(groups) == 1
        keep = at_an_end and last in (layer for _, layer in self.runner.family.parts)
        for number in range(self.runner.batches):
            self._add(groups, found, number, keep=keep)
        if keep:
            self._reached.add(last)
        return found

    def _add(
        self,
        groups: Sequence[tuple[str, ...]],
        found: dict[str, Inputs],
        number: int,
        *,
        keep: bool,
    ) -> None:
        """One batch, to what is found so far. `keep`: also keep what the last group is given."""
        residual_of = dict(self.runner.family.residuals) if self._seen else {}
        watched = {*found, *(residual_of[name] for name in found if name in residual_of)}
        hidden, last = self.runner.hidden("quantized", number), groups[-1][0]
        keywords = self.runner.keywords(self.index, number)
        with self._continued(number), self._watched_experts(), fast_products():
            x, _ = run(self.module, watched, hidden, keywords, last=last)
            for group in groups:
                name, drift, missing = group[0], None, None
                if name in self._seen:
                    drift = self._drift(name, number, x)
                if drift is not None and len(group) == 1:
                    missing, drift = drift @ self.weight(name).T, None
                    if norm := residual_of.get(name):
                        missing += self._drift(norm, number, x)
                found[name].add(x[name], drift, missing)
        if keep:
            self.runner.shelf.put(("reached", last, number), x[last].bfloat16())

    def _drift(self, name: str, number: int, x: dict[str, Tensor]) -> Tensor:
        """What the original's part is given, less what this one's is; the former is forgotten."""
        key = ("seen", number, name)
        y = self.runner.shelf.get(key)
        self.runner.shelf.drop(*key)
        return y - x[name]

    def free(self) -> None:
        """Let go of the weights and of all that was kept."""
        self.module = nn.Identity()
        self.runner.shelf.drop("seen")
        self.runner.shelf.drop("reached")

    def output(self, number: int) -> Tensor:
        """What the block as it is now puts out for a batch."""
        hidden = self.runner.hidden("quantized", number)
        with self._continued(number), fast_products():
            return self.through(hidden, number)

    @contextmanager
    def _continued(self, number: int) -> Iterator[None]:
        """Parts whose last layer has been reached start there, for this batch."""
        changed = []
        for part, layer in self.runner.family.parts:
            if layer in self._reached:
                module, end = self.module.get_submodule(part), self.module.get_submodule(layer)
                kept = self.runner.shelf.get(("reached", layer, number)).float()
                module.forward = Continue(end, kept, tupled=part == "self_attn")
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
        seen = KeyValueRange()
        attentions = [
            part for part in self.module.modules() if hasattr(part, "num_key_value_groups")
        ]
        for part in attentions:
            setattr(part, RANGE, seen)
        for number in range(self.runner.batches):
            self.through(self.runner.hidden("quantized", number), number)
        for part in attentions:
            delattr(part, RANGE)
        return seen.key, seen.value
