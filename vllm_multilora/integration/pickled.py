"""Adapters saved with `torch.save`, for servers that allow them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME

_NAMES = ("adapter_model.bin", "adapter_model.pt")


def pickled_tensors(folder: Path) -> Path | None:
    """The pickled weights of a folder that has no others."""
    if (folder / TENSORS_NAME).exists():
        return None
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


@contextmanager
def as_safetensors(folder: Path, pickled: Path) -> Iterator[Path]:
    """A folder with the same adapter as safetensors, for as long as the block runs.

    The rest of the plugin knows one format only. `weights_only` keeps the unpickler from running
    anything.

    Raises:
        ValueError: The file is no dictionary of tensors.
    """
    tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{pickled} holds no dictionary of tensors, as PEFT saves it")
    with tempfile.TemporaryDirectory(prefix="multilora-") as scratch:
        if (folder / CONFIG_NAME).is_file():
            shutil.copyfile(folder / CONFIG_NAME, Path(scratch) / CONFIG_NAME)
        save_file({n: t.contiguous() for n, t in tensors.items()}, Path(scratch) / TENSORS_NAME)
        yield Path(scratch)
