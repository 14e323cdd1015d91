"""Adapters saved with `torch.save`, for servers that allow them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_multilora.adapters.errors import AdapterError, AdapterFormatError, AdapterReadError
from vllm_multilora.adapters.folder import CONFIG_NAME, PICKLED_NAMES, TENSORS_NAME, unreadable
from vllm_multilora.adapters.problems import Code, Problem, shown_name


def pickled_tensors(folder: Path) -> Path | None:
    """The pickled weights of a folder that has no others."""
    if (folder / TENSORS_NAME).exists():
        return None
    return next((folder / name for name in PICKLED_NAMES if (folder / name).is_file()), None)


@contextmanager
def as_safetensors(folder: Path, pickled: Path) -> Iterator[Path]:
    """A folder with the same adapter as safetensors, for as long as the block runs.

    The rest of the plugin knows one format only. Problems found in the block name the adapter's
    own files.

    Raises:
        AdapterFormatError: The file is no dictionary of tensors.
        AdapterReadError: The file cannot be read.
    """
    tensors = _read(pickled)
    with tempfile.TemporaryDirectory(prefix="multilora-") as name:
        scratch = Path(name)
        if (folder / CONFIG_NAME).is_file():
            shutil.copyfile(folder / CONFIG_NAME, scratch / CONFIG_NAME)
        # Copied, because safetensors refuses tensors that share memory.
        copies = {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        save_file(copies, scratch / TENSORS_NAME)
        try:
            yield scratch
        except AdapterError as error:
            if not error.problems:
                raise
            raise type(error).of(
                *(
                    _of_file(_of_file(p, scratch / TENSORS_NAME, pickled), scratch, folder)
                    for p in error.problems
                )
            ) from error


def _read(pickled: Path) -> dict[str, torch.Tensor]:
    """A file's tensors. `weights_only` keeps the unpickler from running anything."""
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise AdapterReadError.of(unreadable(pickled, error)) from error
    except Exception as error:  # a stranger's bytes may make of the unpickler what they like
        said = str(error).partition("\n")[0]
        raise AdapterFormatError.of(
            _no_tensors(
                pickled, f"not what PyTorch reads without running code ({shown_name(said)})"
            )
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise AdapterFormatError.of(_no_tensors(pickled, "something else"))
    return tensors


def _no_tensors(pickled: Path, found: str) -> Problem:
    return Problem.at(
        Code.NOT_PICKLED_TENSORS,
        str(pickled),
        "",
        found,
        "a dictionary of tensors, as PEFT saves it",
        hint="save the adapter again with PEFT's save_pretrained, which writes safetensors",
    )


def _of_file(problem: Problem, name: Path, true_name: Path) -> Problem:
    """A problem in which a file or folder has another name."""
    return replace(
        problem,
        file=problem.file.replace(str(name), str(true_name)),
        message=problem.message.replace(str(name), str(true_name)),
    )
