"""`adapter_model.safetensors`, open for reading."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from multilora_kernels.blocks import read_span
from vllm_multilora.adapters.errors import AdapterReadError
from vllm_multilora.adapters.folder import open_regular, unreadable
from vllm_multilora.adapters.header import TensorInfo, read_header
from vllm_multilora.adapters.limits import DEFAULT_LIMITS, Limits
from vllm_multilora.adapters.problems import Code, Problem, shown_name

_RENAME = "write adapters under another name, and rename them into place"


@dataclass(frozen=True)
class Fingerprint:
    """What tells one state of a file from another.

    Attributes:
        inode: The file's number in its file system.
        size: Bytes.
        mtime_ns: When its content last changed, in nanoseconds.
    """

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        """The fingerprint in the result of `os.stat` or `os.fstat`."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class TensorFile:
    """A safetensors file, its header read and checked; a context manager that closes it.

    Tensors are read with `pread`, never through a memory map: where a mapped file is truncated
    by someone else, touching the lost pages ends the process with SIGBUS, and all tenants with
    it. A file that is replaced meanwhile is read on as it was; one that is written to in place
    is noticed by its `fingerprint` (see `require_unchanged`).

    Args:
        path: The file.
        limits: What is read at most.

    Attributes:
        tensors_path: The file.
        tensors: The tensors in it by name, in the order of their bytes.
        fingerprint: Of the file, as it was opened.

    Raises:
        AdapterNotFoundError: There is no such file.
        AdapterFormatError: It is no safetensors file, or damaged.
        AdapterReadError: It cannot be read.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self._descriptor = -1
        self.tensors_path = path
        self._descriptor = open_regular(path)
        try:
            self.fingerprint = Fingerprint.of(os.fstat(self._descriptor))
            tensors = read_header(self._descriptor, self.fingerprint.size, str(path), limits)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def fileno(self) -> int:
        """The open file's descriptor.

        Raises:
            ValueError: The file is closed.
        """
        if self._descriptor < 0:
            raise ValueError(f"{self.tensors_path} is closed")
        return self._descriptor

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Reads a tensor of the file into memory, by `pread`, each byte once.

        Args:
            name: The tensor's name in the file.
            target: A contiguous CPU tensor of the same dtype and number of elements.

        Raises:
            KeyError: The file has no such tensor.
            ValueError: `target` does not fit the tensor.
            AdapterReadError: The file ends before the tensor does, or cannot be read.
        """
        info = self.tensors[name]
        if (
            target.dtype != info.dtype
            or target.numel() != math.prod(info.shape)
            or target.device.type != "cpu"
            or not target.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {info.dtype} {list(info.shape)}; a contiguous CPU tensor of as many "
                f"elements is needed, found {target.dtype} {list(target.shape)} on {target.device}"
            )
        try:
            complete = read_span(self.fileno(), info.begin, target)
        except OSError as error:
            raise AdapterReadError.of(unreadable(self.tensors_path, error)) from error
        if not complete:
            raise self.ends_early(name)

    def ends_early(self, name: str) -> AdapterReadError:
        """The error for a file that has become shorter than its header says."""
        found = f"the file ends inside {shown_name(name)}"
        expected = f"{self.tensors[name].end} bytes, as when it was opened"
        return AdapterReadError.of(
            Problem(
                Code.FILE_CHANGED,
                str(self.tensors_path),
                shown_name(name),
                found,
                expected,
                f"{self.tensors_path}: {found}, expected {expected}: it was truncated meanwhile",
                _RENAME,
            )
        )

    def require_unchanged(self) -> None:
        """Raises if the file's content has been written to since it was opened.

        Raises:
            AdapterReadError: It has; what was read since may be a mixture of two adapters.
        """
        now = Fingerprint.of(os.fstat(self.fileno()))
        if now != self.fingerprint:
            problem = Problem.at(
                Code.FILE_CHANGED,
                str(self.tensors_path),
                "",
                f"written to while it was being read ({self.fingerprint}, then {now})",
                "no change",
                verb="was",
                hint=_RENAME,
            )
            raise AdapterReadError.of(problem)
