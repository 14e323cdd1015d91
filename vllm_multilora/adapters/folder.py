"""The two files of an adapter's folder, opened without following surprises."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vllm_multilora.adapters.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.limits import Limits
from vllm_multilora.adapters.problems import Code, Problem, shown_name

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt")
"""What `torch.save` is used for; read only where the settings allow it."""

_EXPECTED = f"an adapter folder that holds {CONFIG_NAME} and {TENSORS_NAME}"
_MOST_NAMED = 5


def open_regular(path: Path) -> int:
    """Opens a file of an adapter's folder for reading; a pipe or device does not block.

    Returns:
        The descriptor; the caller closes it.

    Raises:
        AdapterNotFoundError: The folder or the file does not exist.
        AdapterFormatError: It is no regular file.
        AdapterReadError: It cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterNotFoundError.of(_missing(path)) from None
    except ValueError:  # the path has a null character
        problem = Problem.at(
            Code.FOLDER_MISSING, shown_name(str(path)), "", "not a path", _EXPECTED
        )
        raise AdapterFormatError.of(problem) from None
    except OSError as error:
        raise AdapterReadError.of(unreadable(path, error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        problem = Problem.at(Code.NOT_A_FILE, str(path), "", "not a regular file", "a file")
        raise AdapterFormatError.of(problem)
    return descriptor


def read_config(folder: Path, limits: Limits) -> bytes:
    """The content of a folder's `adapter_config.json`.

    Raises:
        AdapterError: As `open_regular`; or the file is too large, or cannot be read.
    """
    path = folder / CONFIG_NAME
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            content = file.read(limits.config_bytes + 1)
        except OSError as error:
            raise AdapterReadError.of(unreadable(path, error)) from error
    if len(content) > limits.config_bytes:
        problem = Problem.at(
            Code.FILE_TOO_LARGE,
            str(path),
            "",
            f"longer than {limits.config_bytes} bytes",
            "what PEFT's save_pretrained writes",
        )
        raise AdapterFormatError.of(problem)
    return content


def unreadable(path: Path, error: OSError) -> Problem:
    """The problem of a file that the system does not let us read."""
    return Problem.at(
        Code.FILE_UNREADABLE,
        str(path),
        "",
        f"unreadable ({error.strerror})",
        "a file that the server's user may read",
    )


def _missing(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        message = f"the adapter folder {folder} does not exist, expected {_EXPECTED}"
        return Problem(Code.FOLDER_MISSING, str(folder), "", "nothing", _EXPECTED, message)
    others = sorted(other.name for other in folder.glob("adapter_model*"))[:_MOST_NAMED]
    if path.name != TENSORS_NAME or not others:
        message = f"{path} does not exist, expected {_EXPECTED}"
        return Problem(Code.FILE_MISSING, str(path), "", "nothing", _EXPECTED, message)
    found = shown_name(", ".join(others))
    return Problem(
        Code.FILE_MISSING,
        str(path),
        "",
        found,
        TENSORS_NAME,
        f"{path} does not exist; the folder has {found} instead, expected {TENSORS_NAME}",
        "save the adapter as one safetensors file (PEFT's default); pickled weights can run code",
    )
