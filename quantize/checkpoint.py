"""A model folder on disk: read lazily, tensor by tensor; written in shards and made visible all at
once.

The folder is the only link between `quantize` and `serve`. Called by `run`, `blocks`, `simulate`
and `inspect`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import BadInput

INDEX = "model.safetensors.index.json"
REPORT = "quantize_report.json"
# Weights in any form, and what belongs to an earlier quantization: everything else in a folder is
# copied.
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
    """A folder with config.json and safetensors weights. Tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when the folder is missing, is no checkpoint, or a shard is not whole."""
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
            shard_of = dict(self._json(INDEX).get("weight_map", {}))
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

    def shape_and_dtype(self, name: str) -> tuple[list[int], str]:
        """From the header alone, without reading the tensor."""
        part = self._open(self._shard_of[name]).get_slice(name)
        return list(part.get_shape()), str(part.get_dtype())

    def weight_files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self._shard_of.values()))]

    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weight_files())

    def side_files(self) -> list[str]:
        """Every other file that a server may want: tokenizer, chat template, custom code, ..."""
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
    """The folder of a model: the path itself, or a download of `organisation/name` from the hub."""
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


class Writer:
    """Writes a checkpoint into a hidden folder beside `out`, and renames it to `out` when it is
    complete.

    A run that is killed therefore leaves nothing that looks finished. What dead runs left is swept
    at the next start.
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        shard_bytes: int = 4 * 1024**3,
    ) -> None:
        """Raises BadInput when `out` may not be made or replaced (never the source or what holds
        it, and nothing but a checkpoint), or when its disk has no room for `needed_bytes`.
        """
        self._out = out.expanduser().resolve()
        if self._out in (source.resolve(), *source.resolve().parents):
            raise BadInput(f"{out} is or holds the original; choose another --out.")
        if self._out.is_dir() and any(self._out.iterdir()):
            if not overwrite:
                raise BadInput(f"{out} exists already; choose another --out or pass --overwrite.")
            if not (self._out / "config.json").is_file():
                raise BadInput(f"{out} is not a checkpoint, so --overwrite leaves it alone.")
        elif self._out.exists() and not self._out.is_dir():
            raise BadInput(f"{out} is a file; choose another --out.")
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            free_bytes = shutil.disk_usage(self._out.parent).free
            if free_bytes < needed_bytes:
                raise BadInput(
                    f"{out} needs {needed_bytes:,} bytes of disk (what it replaces goes last), and "
                    f"{free_bytes:,} are free there; make room, or choose another --out."
                )
            self.folder = self._out.parent / f".{self._out.name}.partial-{os.getpid()}"
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error}.") from error

    def _sweep(self) -> None:
        """Remove what runs that are dead by now left: halves, and replaced checkpoints."""
        for kind in ("partial", "retired"):
            for left in self._out.parent.glob(f".{self._out.name}.{kind}-*"):
                owner = left.name.rpartition("-")[2]
                if owner.isdigit() and not _is_alive(int(owner)):
                    if kind == "retired" and not self._out.exists():
                        left.rename(self._out)  # killed between the two renames of publish
                    else:
                        shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors; a full shard goes to disk at once."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.contiguous()
            self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        name = f"shard-{len(self._shards):05d}"
        save_file(self._pending, self.folder / name, metadata={"format": "pt"})
        # save_file makes files for the owner only; a server may run as somebody else.
        (self.folder / name).chmod(0o644)
        self._shards.append(
            {key: tensor.numel() * tensor.element_size() for key, tensor in self._pending.items()}
        )
        self._pending, self._pending_bytes = {}, 0

    def finish_weights(self) -> None:
        """Write the last shard, give the shards their final names, and index them when there are
        several.
        """
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, sizes in enumerate(self._shards):
            name = (
                "model.safetensors"
                if count == 1
                else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            (self.folder / f"shard-{number:05d}").rename(self.folder / name)
            weight_map |= dict.fromkeys(sizes, name)
        if count > 1:
            total = sum(sum(sizes.values()) for sizes in self._shards)
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")

    def copy_side_files(self, source: Checkpoint) -> None:
        for name in source.side_files():
            shutil.copyfile(source.folder / name, self.folder / name)

    def publish(self) -> None:
        """Make the folder visible under its name, in one rename."""
        if self._out.exists():
            # rename() replaces an empty folder only; the old checkpoint goes when the new one is
            # complete.
            retired = self._out.parent / f".{self._out.name}.retired-{os.getpid()}"
            self._out.rename(retired)
            self.folder.rename(self._out)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            self.folder.rename(self._out)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
