"""The weights of an adapter, copied byte for byte or folded from AdaLoRA into plain LoRA.

Called by `formats`, on files whose headers it has checked. Tensors are read one at a time, so a
copy takes little memory. numpy is imported late: only the engine's dependencies bring it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from packhorse.serve.adapters.factors import PREFIX, Factors
from packhorse.serve.adapters.folders import Source, open_file
from packhorse.serve.adapters.headers import (
    DTYPE_BYTES,
    BadHeader,
    Header,
    TensorEntry,
    read_header,
    shown,
)
from packhorse.serve.errors import Invalid

if TYPE_CHECKING:
    from hashlib import _Hash

    import numpy as np
    import numpy.typing as npt

NAME = "adapter_model.safetensors"
# Above the header size of any adapter: a tensor takes about 150 bytes in it.
MAX_HEADER_BYTES = 16 * 2**20
_CHUNK_BYTES = 4 * 2**20
# The exponent's bit mask by dtype. All of its bits are set in NaN and infinity.
_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
# PEFT divides by AdaLoRA's rank plus this epsilon.
_RANK_EPSILON = 1e-5


class HashedFile:
    """A file that is hashed while it is written; `file` None: hashed only. One `sha256` may go on
    over several files.
    """

    def __init__(self, file: BinaryIO | None, sha256: _Hash) -> None:
        self._file = file
        self._sha256 = sha256

    def write(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._file is not None:
            self._file.write(data)


@contextmanager
def new_file(path: Path, sha256: _Hash) -> Iterator[HashedFile]:
    """Create a file, which must not exist; read-only, and synced to the disk at the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o444), "wb") as file:  # noqa: PTH123 (a Path has no flags)
        yield HashedFile(file, sha256)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Source, header: Header, to: HashedFile) -> None:
    """Copy the weights as they are. Raises Invalid when the file is not the one that was checked,
    or holds a NaN or an infinity.
    """
    with _unchanged(source, header) as file:
        file.seek(0)
        tensors = sorted(header.tensors.items(), key=lambda item: item[1].start)
        first = min((entry.start for _, entry in tensors), default=header.file_bytes)
        to.write(_exactly(file, first))
        for name, entry in tensors:  # contiguous, as the header's check made sure
            left = entry.end - entry.start
            while left:
                data = _exactly(file, min(left, _CHUNK_BYTES))
                _check_finite(name, entry.dtype, data)
                to.write(data)
                left -= len(data)


def fold(
    source: Source,
    header: Header,
    modules: Mapping[str, Factors],
    *,
    kept: Mapping[str, Sequence[int]],
    scaling: float,
    to: HashedFile,
) -> None:
    """Write AdaLoRA as plain LoRA of one rank whose own scaling is 1.

    AdaLoRA adds B @ (A * E) * scaling, so A * E * scaling becomes the new A. Each module keeps its
    ranks `kept`, padded with zeros to the largest number of them: the engine allocates the full
    rank for every module anyway. The result is float32 for every source dtype, so it loses no
    precision.

    Raises Invalid like `copy`, and when the product leaves float32's range.
    Source: SVDLinear.get_delta_weight in PEFT 0.21, tuners/adalora/layer.py.
    """
    import numpy as np

    shapes = _folded_shapes(header, modules, kept)
    to.write(_header_of(shapes))
    with _unchanged(source, header) as file:

        def read(module: str, part: str) -> npt.NDArray[np.float32]:
            name = modules[module].names[part]
            return _read(file, name, header.tensors[name])

        for name, shape in shapes.items():
            module, part = _parse(name)
            ranks = list(kept[module])
            folded = np.zeros(shape, dtype="<f4")
            if part == "lora_B":
                folded[:, : len(ranks)] = read(module, part)[:, ranks]
            else:
                with np.errstate(over="ignore"):  # refused below
                    product = read(module, "lora_A").astype(np.float64) * read(module, "lora_E")
                    folded[: len(ranks)] = product[ranks] * scaling
                if not np.isfinite(folded).all():
                    raise Invalid(
                        f"{module}: lora_A times lora_E is above what float32 holds; the training "
                        "diverged, train again with a lower learning rate."
                    )
            to.write(folded.tobytes())


def adalora_scaling(alpha: float, init_rank: int) -> float:
    """AdaLoRA's scaling: it divides by the initial rank, also after pruning."""
    return alpha / (init_rank + _RANK_EPSILON)


def folded_bytes(
    header: Header, modules: Mapping[str, Factors], kept: Mapping[str, Sequence[int]]
) -> int:
    """The size of the file that `fold` writes."""
    shapes = _folded_shapes(header, modules, kept)
    return len(_header_of(shapes)) + sum(4 * math.prod(shape) for shape in shapes.values())


def _folded_shapes(
    header: Header, modules: Mapping[str, Factors], kept: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int]]:
    """Name -> shape of the tensors that `fold` writes. Modules with no rank left are left out: they
    change nothing.
    """
    rank = max(len(ranks) for ranks in kept.values())
    shapes = {}
    for module in sorted(modules):
        if kept[module]:
            names = modules[module].names
            inputs = header.tensors[names["lora_A"]].shape[1]
            outputs = header.tensors[names["lora_B"]].shape[0]
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (rank, inputs)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (outputs, rank)
    return shapes


def _parse(name: str) -> tuple[str, str]:
    module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return module, part


def _header_of(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    end = 0
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        document[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _unchanged(source: Source, header: Header) -> Iterator[BinaryIO]:
    """Open the weights' file; raises Invalid when its header is not the one that was checked."""
    changed = Invalid(
        f"{NAME} in {source.folder} has changed while it was read; add the adapter again when "
        "whoever writes there is done."
    )
    try:
        with open_file(source, NAME) as file:
            if read_header(file, max_bytes=MAX_HEADER_BYTES) != header:
                raise changed
            yield file
    except (BadHeader, FileNotFoundError, EOFError) as error:
        raise changed from error


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:  # truncated since its header was read
        raise EOFError
    return data


def _check_finite(name: str, dtype: str, data: bytes) -> None:
    import numpy as np

    unsigned, exponent = _EXPONENT[dtype]
    if (np.frombuffer(data, unsigned) & exponent == exponent).any():
        raise Invalid(
            f"The tensor {shown(name)} holds a NaN or an infinity; the training diverged, train "
            "again with a lower learning rate or take an earlier checkpoint."
        )


def _read(file: BinaryIO, name: str, entry: TensorEntry) -> npt.NDArray[np.float32]:
    """A tensor as float32."""
    import numpy as np

    file.seek(entry.start)
    data = _exactly(file, entry.end - entry.start)
    _check_finite(name, entry.dtype, data)
    assert len(data) == math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
    match entry.dtype:
        case "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        case "F16":
            values = np.frombuffer(data, "<f2").astype("<f4")
        case _:
            values = np.frombuffer(data, "<f4")
    return values.reshape(entry.shape)
