"""Adapters saved with `torch.save`, for servers that allow them.

The rest of the package knows one format only: a pickle becomes a safetensors image in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from multilora_kernels.dtypes import SAFETENSORS_DTYPES, of_torch
from vllm_multilora.adapters.adapter_errors import AdapterFormatError, AdapterReadError
from vllm_multilora.adapters.files.adapter_folder import PICKLED_NAMES, TENSORS_NAME, AdapterFolder
from vllm_multilora.adapters.files.regular_file import RegularFile, too_large, unreadable
from vllm_multilora.adapters.problems import Code, Problem, shown_name

if TYPE_CHECKING:
    import torch

_NO_MEMORY = "can't allocate memory"
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def pickled_name(folder: AdapterFolder) -> str | None:
    """The pickled weights of a folder that has no others."""
    if folder.has(TENSORS_NAME):
        return None
    return next(filter(folder.has, PICKLED_NAMES), None)


def as_safetensors(pickled: RegularFile, most_bytes: int) -> RegularFile:
    """The same tensors as a safetensors file in memory, under the same name.

    Raises:
        AdapterFormatError: The file is no dictionary of tensors, or is too large.
        AdapterReadError: The file cannot be read.
    """
    _require_size(pickled, pickled.fingerprint.size, most_bytes)
    tensors = _read(pickled)
    # Tensors may share memory: two may be one, and one may repeat a row a million times.
    _require_size(pickled, sum(tensor.nbytes for tensor in tensors.values()), most_bytes)
    image = RegularFile(_write(tensors, pickled), pickled.path)
    pickled.require_unchanged()
    return image


def _read(pickled: RegularFile) -> dict[str, torch.Tensor]:
    """A file's tensors. `weights_only` keeps the unpickler from running anything."""
    import torch

    try:
        with os.fdopen(os.dup(pickled.fileno()), "rb") as file:
            file.seek(0)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise AdapterReadError.of(unreadable(pickled.path, error)) from error
    except Exception as error:  # a stranger's bytes may make of the unpickler what they like
        if _NO_MEMORY in str(error):  # PyTorch has no exception of its own for it
            raise MemoryError(f"for the tensors of {pickled.path}") from None
        said = str(error).partition("\n")[0]
        found = f"not what PyTorch reads without running code ({shown_name(said)})"
        raise AdapterFormatError.of(_no_tensors(pickled, found)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.is_cpu  # and no meta tensor, which has no bytes
        and not tensor.is_nested
        and of_torch(tensor.dtype) in _NAMES
        for name, tensor in tensors.items()
    ):
        raise AdapterFormatError.of(_no_tensors(pickled, "something else"))
    return tensors


def _write(tensors: Mapping[str, torch.Tensor], pickled: RegularFile) -> int:
    """Writes a safetensors file; returns its descriptor."""
    import torch

    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[of_torch(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    try:
        text = json.dumps(header).encode()
        descriptor = os.memfd_create("multilora-adapter", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                content = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
                file.write(content.view(torch.uint8).numpy().data)
    except OSError as error:
        raise AdapterReadError.of(unreadable(pickled.path, error)) from error
    return descriptor


def _require_size(pickled: RegularFile, size: int, most: int) -> None:
    if size > most:
        raise AdapterFormatError.of(too_large(str(pickled.path), size, most))


def _no_tensors(pickled: RegularFile, found: str) -> Problem:
    return Problem.at(
        Code.NOT_PICKLED_TENSORS,
        str(pickled.path),
        "",
        found,
        "a dictionary of tensors, as PEFT saves it",
        hint="save the adapter again with PEFT's save_pretrained, which writes safetensors",
    )
