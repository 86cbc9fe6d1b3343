"""A model folder on disk, read lazily, tensor by tensor.

Model folders are the only link between `quantize` and `serve`. Read by most rooms of quantize;
written by output/workspace.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packhorse.quantize.errors import BadInput

INDEX = "model.safetensors.index.json"
REPORT = "quantize_report.json"
# Side files are all files of a folder but these, and but weights in any format.
_NOT_COPIED = {"config.json", "quantize_config.json", "quant_config.json", REPORT}
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".index.json",
)


_OTHER_WEIGHTS = [f"*{suffix}" for suffix in _WEIGHT_SUFFIXES[1:-1]] + ["original/*"]


class Checkpoint:
    """A folder with config.json and safetensors weights. A tensor is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when the folder is missing, is no checkpoint, or has a damaged shard."""
        if not folder.is_dir():
            raise BadInput(
                f"{folder} is not a folder; give a model folder or a hub name (organisation/name)."
            )
        self.folder = folder
        self.config = self._json("config.json")
        self._handles: dict[str, Any] = {}
        self._shard_of = self._find_tensors()

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BadInput(f"{self.folder} has no {name}, so it is not a model folder.") from error
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read: {error}.") from error
        if not isinstance(document, dict):
            raise BadInput(f"{path} does not hold a JSON object.")
        return document

    def _find_tensors(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            shard_of = self._json(INDEX).get("weight_map")
            if not isinstance(shard_of, dict):
                raise BadInput(f"{self.folder / INDEX} has no weight_map.")
            if missing := sorted(
                {shard for shard in shard_of.values() if not (self.folder / shard).is_file()}
            ):
                raise BadInput(f"{self.folder}: the index names {missing[0]}, which is not there.")
        else:
            whole = self.folder / "model.safetensors"
            files = [whole] if whole.exists() else sorted(self.folder.glob("*.safetensors"))
            if len(files) > 1:
                raise BadInput(f"{self.folder} has {len(files)} weight files but no {INDEX}.")
            shard_of = {name: path.name for path in files for name in self._open(path.name).keys()}  # noqa: SIM118
        if not shard_of:
            raise BadInput(
                f"{self.folder} has no *.safetensors weights; "
                "convert the checkpoint to safetensors first."
            )
        return shard_of

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            try:
                self._handles[shard] = safe_open(self.folder / shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    f"{self.folder / shard} is not a whole safetensors file: {error}."
                ) from error
        return self._handles[shard]

    def names(self) -> list[str]:
        """All tensor names, in a stable order."""
        return sorted(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def get(self, name: str) -> Tensor:
        """Read one tensor. Raises BadInput when the folder has none of that name."""
        if name not in self._shard_of:
            raise BadInput(f"{self.folder} has no tensor {name}; the checkpoint is incomplete.")
        try:
            tensor: Tensor = self._open(self._shard_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise BadInput(f"{self.folder}: tensor {name} cannot be read: {error}.") from error
        return tensor

    def number(self, key: str) -> int:
        """A whole number of the config or of its text part; 0 when neither has it."""
        value = self.config.get(key, (self.config.get("text_config") or {}).get(key))
        return value if isinstance(value, int) else 0

    def close_files(self) -> None:
        """Close and unmap the weight files; the next read opens them again. Mapped pages that were
        read count as this process's memory.
        """
        self._handles.clear()

    def shape_and_dtype(self, name: str) -> tuple[list[int], str]:
        """From the file's header; the dtype is safetensors' name, such as BF16."""
        try:
            part = self._open(self._shard_of[name]).get_slice(name)
        except SafetensorError as error:
            raise BadInput(
                f"{self.folder}: the index has {name} in {self._shard_of[name]}, which has not."
            ) from error
        return list(part.get_shape()), str(part.get_dtype())

    def shape_of_weight(self, layer: str) -> tuple[int, int]:
        """(O, I) of a linear layer."""
        (outputs, inputs), _ = self.shape_and_dtype(f"{layer}.weight")
        return outputs, inputs

    def weight_files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self._shard_of.values()))]

    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weight_files())

    def side_files(self) -> list[str]:
        """The names of all other files, which a server may need: tokenizer, chat template, custom
        code, ...
        """
        return [
            path.name
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and path.name not in _NOT_COPIED
            and not path.name.endswith(_WEIGHT_SUFFIXES)
        ]

    def side_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.side_files())


def find(model: str) -> Path:
    """The folder of a model: the path itself, or a download of `organisation/name` from the hub.
    Raises BadInput when the download fails.
    """
    path = Path(model).expanduser()
    if (
        path.exists()
        or model.count("/") != 1
        or path.parent.exists()
        or model.startswith(("/", ".", "~"))
    ):
        return path
    try:
        return Path(snapshot_download(model, ignore_patterns=_OTHER_WEIGHTS))
    except Exception as error:
        raise BadInput(
            f"{model} is not a folder here, and the hub did not deliver it: {error}"
        ) from error


def sha256_of(files: list[Path]) -> str:
    """One digest over the bytes of all files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
