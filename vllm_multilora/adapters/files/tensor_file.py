"""`adapter_model.safetensors`: which tensors it has, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vllm_multilora.adapters.adapter_errors import AdapterReadError
from vllm_multilora.adapters.files.header import TensorInfo, read_header
from vllm_multilora.adapters.files.regular_file import RENAME_HINT, RegularFile
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS, SizeLimits
from vllm_multilora.adapters.problems import Code, Problem, shown_name


class TensorFile:
    """A safetensors file, its header read and checked.

    Attributes:
        tensors: The tensors in it by name, in the order of their bytes.

    Raises:
        AdapterFormatError: It is no safetensors file, or damaged.
        AdapterReadError: It cannot be read.
    """

    def __init__(
        self,
        file: RegularFile,
        limits: SizeLimits = DEFAULT_LIMITS,
        show: Callable[[memoryview], object] | None = None,
    ) -> None:
        self.file = file
        tensors = read_header(file, limits, show)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    @property
    def begin(self) -> int:
        """The first byte of the first tensor; the file's end if there is none."""
        return min((info.begin for info in self.tensors.values()), default=self.end)

    @property
    def end(self) -> int:
        """One past the last byte of the last tensor: the file's end."""
        return self.file.fingerprint.size

    def ends_early(self, at: int) -> AdapterReadError:
        """The error for a file that has become shorter than its header says."""
        inside = (name for name, info in self.tensors.items() if info.end > at)
        name = next(inside, "its last tensor")
        path, found = self.file.path, f"the file ends inside {shown_name(name)}"
        expected = f"{self.end} bytes, as when it was opened"
        return AdapterReadError.of(
            Problem(
                Code.FILE_CHANGED,
                str(path),
                shown_name(name),
                found,
                expected,
                f"{path}: {found}, expected {expected}: it was truncated meanwhile",
                RENAME_HINT,
            )
        )
