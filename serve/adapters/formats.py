"""Fine-tuned folders: checks whether the engine can serve one, and writes the copy that it serves.

Supports PEFT's LoRA and AdaLoRA in safetensors; AdaLoRA is converted to plain LoRA, the only form
that the engine has. Adapters are checked by adapter_config.json and the safetensors header before
the engine sees them, and nothing is ever unpickled. The functions block: call them in a worker
thread. Called by the store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packhorse.serve.adapters import configs, weights
from packhorse.serve.adapters.configs import AdapterConfig, Kind
from packhorse.serve.adapters.factors import Factors, find_factors
from packhorse.serve.adapters.folders import Source, check_entries, open_file
from packhorse.serve.adapters.headers import BadHeader, Header, TensorEntry, read_header, shown
from packhorse.serve.adapters.patterns import matcher
from packhorse.serve.errors import Invalid, Unavailable

_PICKLES = ("adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class AdapterLimits:
    """Limits of this server: ranks up to max_rank, for these layers of the base (module ->
    (out_features, in_features), see base_layers), in weight files of at most max_bytes.
    """

    max_rank: int
    layers: Mapping[str, tuple[int, int]]
    max_bytes: int

    @cached_property
    def key(self) -> str:
        """A digest of the limits and of the source code of the checks. With an equal key, `check`
        has the same result for an unchanged folder. A version number raised by hand would be
        forgotten once.
        """
        sha256 = hashlib.sha256()
        for name in ("formats", "configs", "factors", "headers", "patterns"):
            sha256.update((Path(__file__).parent / f"{name}.py").read_bytes())
        limits = [self.max_rank, self.max_bytes, sorted(self.layers.items())]
        sha256.update(json.dumps(limits).encode())
        return sha256.hexdigest()


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter in its source folder that has passed the checks.

    `config` is its adapter_config.json, `rank` the highest rank of any module in the copy to serve,
    `served_config` that copy's configuration. `modules` and `kept` (AdaLoRA: module -> the ranks
    that were not pruned) are for `write`.
    """

    source: Source
    kind: Kind
    config: Mapping[str, Any]
    rank: int
    served_config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, Factors]
    kept: Mapping[str, Sequence[int]]
    scaling: float = 1.0

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self.header.tensors

    @property
    def served_bytes(self) -> int:
        """The size of the copy's weights."""
        if self.kind == "adalora":
            return weights.folded_bytes(self.header, self.modules, self.kept)
        return self.header.file_bytes


@dataclass(frozen=True)
class Written:
    """`digest` is the sha256, in hex, of the written weights followed by the written configuration.
    Equal weights with equivalent configurations have the same digest.
    """

    digest: str
    rank: int


def check(folder: Path | Source, limits: AdapterLimits) -> CheckedAdapter:
    """Check a folder that PEFT's save_pretrained() wrote; links in a folder given as Path must stay
    in it. Reads the configuration and the weights' header, not the weights.

    Raises Invalid, with the way out, when the folder is not such a folder, holds links that lead
    out or special files, needs a feature that the engine lacks, belongs to another base, or is
    above a limit.
    """
    source = folder if isinstance(folder, Source) else Source.alone(folder)
    check_entries(source)
    document = _read_config(source)
    config = configs.judge(document)
    header = _read_header(source, limits.max_bytes)
    modules = find_factors(header.tensors, config.kind, limits.layers)
    judge = _check_adalora if config.kind == "adalora" else _check_lora
    checked = judge(source, document, config, header, modules)
    if checked.rank > limits.max_rank:
        worst = max(
            modules, key=lambda module: len(checked.kept.get(module, range(modules[module].rank)))
        )
        raise Invalid(
            f"The adapter's rank {checked.rank} (at {worst}) is above this server's limit of "
            f"{limits.max_rank}; train with a lower rank, or raise engine.max_lora_rank."
        )
    if config.kind == "adalora":
        size = checked.served_bytes
        _check_size(size, limits.max_bytes, "would take, as plain LoRA in float32,")
    return checked


def _read_config(source: Source) -> dict[str, Any]:
    folder = source.folder
    try:
        with open_file(source, configs.NAME) as file:
            text = file.read(configs.MAX_BYTES + 1)
    except FileNotFoundError as error:
        whole = os.path.lexists(folder / "config.json")
        hint = (
            "it looks like a whole model, which `packhorse serve` takes as it is"
            if whole
            else "give the folder that the PEFT model's save_pretrained() wrote"
        )
        raise Invalid(f"{folder} has no {configs.NAME}; {hint}.") from error
    if len(text) > configs.MAX_BYTES:
        raise Invalid(
            f"{configs.NAME} is above the limit of {configs.MAX_BYTES} bytes; save the adapter "
            "again, or remove from it what PEFT did not write."
        )
    return configs.parse(text)


def _read_header(source: Source, max_bytes: int) -> Header:
    folder = source.folder
    try:
        with open_file(source, weights.NAME) as file:
            _check_size(os.fstat(file.fileno()).st_size, max_bytes, "has")
            return read_header(file, max_bytes=weights.MAX_HEADER_BYTES)
    except FileNotFoundError as error:
        for name in _PICKLES:
            if os.path.lexists(folder / name):
                raise Invalid(
                    f"{folder} has {name} and no {weights.NAME}. Loading a pickle can run any "
                    "code, so it is never done; save the adapter as safetensors "
                    "(save_pretrained(folder, safe_serialization=True))."
                ) from error
        raise Invalid(
            f"{folder} has no {weights.NAME}; give the folder that the PEFT model's "
            "save_pretrained() wrote."
        ) from error
    except BadHeader as error:
        raise Invalid(f"{weights.NAME} {error}.") from error


def _check_size(size: int, max_bytes: int, verb: str) -> None:
    if size > max_bytes:
        raise Invalid(
            f"{weights.NAME} {verb} {size} bytes, above the limit of {max_bytes}; train with a "
            "lower rank or fewer target_modules, or raise adapters.max_bytes."
        )


def _check_lora(
    source: Source,
    document: Mapping[str, Any],
    config: AdapterConfig,
    header: Header,
    modules: Mapping[str, Factors],
) -> CheckedAdapter:
    rank_of = matcher("rank_pattern", config.rank_pattern)
    alpha_of = matcher("alpha_pattern", config.alpha_pattern)
    alphas = {}
    for module, factors in modules.items():
        said = rank_of(module)
        said = config.rank if said is None else said
        if factors.rank != said:
            raise Invalid(
                f"{module} has rank {factors.rank} in {weights.NAME} and {said} in {configs.NAME} "
                "(r, rank_pattern), which scales it; correct the one that is wrong."
            )
        alpha = alpha_of(module)
        alphas[module] = config.alpha if alpha is None else alpha
    ranks = {module: factors.rank for module, factors in modules.items()}
    rank = max(ranks.values())
    served = _served_config(ranks, alphas, use_rslora=config.use_rslora)
    return CheckedAdapter(source, config.kind, document, rank, served, header, modules, {})


def _check_adalora(
    source: Source,
    document: Mapping[str, Any],
    config: AdapterConfig,
    header: Header,
    modules: Mapping[str, Factors],
) -> CheckedAdapter:
    if strangers := sorted(config.masks.keys() - modules.keys()):
        raise Invalid(
            f"{configs.NAME}'s rank_pattern names {shown(strangers[0])}, of which {weights.NAME} "
            "has no tensors: one of the two is from another save; save the adapter again."
        )
    kept: dict[str, Sequence[int]] = {}
    for module, factors in modules.items():
        mask = config.masks.get(module, (True,) * config.rank)
        if factors.rank == sum(mask):  # PEFT drops pruned ranks when it saves
            kept[module] = range(factors.rank)
        elif factors.rank == len(mask):
            kept[module] = [rank for rank, keep in enumerate(mask) if keep]
        else:
            raise Invalid(
                f"{module} has rank {factors.rank} in {weights.NAME}, and {configs.NAME} (init_r, "
                f"rank_pattern) says {sum(mask)} of {len(mask)}; save the adapter again."
            )
    rank = max(map(len, kept.values()))
    if rank == 0:
        raise Invalid(
            "AdaLoRA pruned every rank of every module, so the adapter has rank 0 and changes "
            "nothing; train again with a higher target_r."
        )
    changed = [module for module in modules if kept[module]]
    served = _served_config(
        dict.fromkeys(changed, rank), dict.fromkeys(changed, float(rank)), use_rslora=False
    )
    scaling = weights.adalora_scaling(config.alpha, config.rank)
    return CheckedAdapter(
        source, config.kind, document, rank, served, header, modules, kept, scaling
    )


def _served_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, use_rslora: bool
) -> dict[str, Any]:
    """The canonical configuration for these ranks and alphas by module: equal for all
    configurations that mean the same. It has only fields that the engine reads.
    """
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "bias": "none",
        "r": int(rank),
        "lora_alpha": _plain(alpha),
        "use_rslora": use_rslora,
        "rank_pattern": {
            _exactly(module): value for module, value in ranks.items() if value != rank
        },
        "alpha_pattern": {
            _exactly(module): _plain(value) for module, value in alphas.items() if value != alpha
        },
        "target_modules": sorted(ranks),
    }


def _exactly(module: str) -> str:
    """A pattern key that matches this module and no module whose name merely ends with it."""
    return f"^{re.escape(module)}"


def _most_common(values: Iterable[float]) -> float:
    """The most common value; of equally common ones the largest."""
    counts = Counter(values)
    return max((count, value) for value, count in counts.items())[1]


def _plain(number: float) -> float:
    """16 for 16.0: training tools write either."""
    return int(number) if number.is_integer() else number


def write(checked: CheckedAdapter, folder_to: Path) -> Written:
    """Write the copy that is served into an existing, empty folder: adapter_model.safetensors (a
    LoRA's byte for byte, an AdaLoRA's folded into float32 LoRA) and adapter_config.json. Both are
    read-only and on the disk when this returns; neither is left there when it raises.

    Raises Invalid when the source has changed since it was checked, or holds a NaN or an infinity;
    Unavailable when the disk is full; FileExistsError when the folder is not empty.
    """
    sha256 = hashlib.sha256()
    names: list[Path] = []
    try:
        path = folder_to / weights.NAME
        with weights.new_file(path, sha256) as file:
            names.append(path)
            _write_weights(checked, file)
        path = folder_to / configs.NAME
        with weights.new_file(path, sha256) as file:
            names.append(path)
            file.write(_config_text(checked))
        _sync(folder_to)
    except BaseException as error:
        for path in names:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder_to, checked.header.file_bytes) from error
        raise
    return Written(sha256.hexdigest(), checked.rank)


def digest_of(checked: CheckedAdapter) -> str:
    """The digest that `write` would return, without writing. Raises Invalid like `write`."""
    sha256 = hashlib.sha256()
    _write_weights(checked, weights.HashedFile(None, sha256))
    sha256.update(_config_text(checked))
    return sha256.hexdigest()


def _write_weights(checked: CheckedAdapter, file: weights.HashedFile) -> None:
    if checked.kind == "adalora":
        weights.fold(
            checked.source, checked.header, checked.modules,
            kept=checked.kept, scaling=checked.scaling, to=file,
        )  # fmt: skip
    else:
        weights.copy(checked.source, checked.header, file)


def _config_text(checked: CheckedAdapter) -> bytes:
    text = json.dumps(checked.served_config, sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def _disk_full(folder_to: Path, size: int) -> Unavailable:
    free = shutil.disk_usage(folder_to).free
    return Unavailable(
        f"The disk of the adapter store ({folder_to.parent}) is full: {free} bytes are free, and "
        f"the adapter takes {size}; free some, for instance by removing adapters, and try again.",
        retry_after_s=60.0,
    )


def _sync(folder: Path) -> None:
    """fsync the folder, so that the new files survive a power failure."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
