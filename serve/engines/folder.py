"""Find a model's folder.

Apart from the engine, so that a wrong path is told at once: importing vllm takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from serve.errors import StartupError

# The same weights in forms that are not served.
OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


def model_folder(model: str) -> Path:
    """The local folder of a model: the path itself, or a download of `organisation/name` from the
    hub.

    Raises StartupError when it is neither, or holds nothing to serve.
    """
    path = Path(model).expanduser()
    if (
        not path.exists()
        and model.count("/") == 1
        and not path.parent.exists()
        and not model.startswith(("/", ".", "~"))
    ):
        try:
            path = Path(snapshot_download(model, ignore_patterns=OTHER_WEIGHTS))
        except Exception as error:
            raise StartupError(
                f"{model} is not a folder here, and the hub did not deliver it: {error}"
            ) from error
    if not path.is_dir():
        raise StartupError(
            f"{model} is not a folder; give a model folder or a hub name like organisation/name."
        )
    if not (path / "config.json").is_file():
        raise StartupError(f"{model} has no config.json, so it is not a model folder.")
    if not any(path.glob("*.safetensors")):
        raise StartupError(
            f"{model} has no *.safetensors weights; convert the checkpoint to safetensors first."
        )
    return path
