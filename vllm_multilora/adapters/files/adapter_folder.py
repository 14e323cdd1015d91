"""An adapter's folder, opened once, and its files, opened without following links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from vllm_multilora.adapters.adapter_errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.files.missing_files import EXPECTED, no_file, no_folder
from vllm_multilora.adapters.files.regular_file import OpenDescriptor, RegularFile, unreadable
from vllm_multilora.adapters.model.size_limits import SizeLimits
from vllm_multilora.adapters.problems import Code, Problem, shown_name

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt")
"""What `torch.save` is used for; read only where the settings allow it."""

_MAX_LISTED = 1000
_MAX_NESTED = 16
_ANYWHERE = AllowedRoots(())


class AdapterFolder(OpenDescriptor):
    """An adapter's folder; a context manager that closes it, but no file.

    The folder is opened once and its files are opened below that descriptor. Each is first opened
    without any right to read it; what the descriptor then refers to is judged, and only this is
    opened for reading. So a link that is changed at any moment leads nowhere else, and opening
    a pipe or a device neither blocks nor does anything.

    Raises:
        AdapterNotFoundError: There is no such folder.
        AdapterFormatError: It lies outside the roots, or it is no path.
        AdapterReadError: It cannot be opened.
    """

    def __init__(self, path: str | Path, roots: AllowedRoots = _ANYWHERE) -> None:
        self._roots = roots
        self.path = Path(path)
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            super().__init__(os.open(self.path, flags))
        except ValueError:  # the path has a null character, or one that cannot be encoded
            raise AdapterFormatError.of(_no_path(self.path)) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise AdapterFormatError.of(_no_path(self.path)) from None
            # Nobody learns what there is, or is not, outside the roots.
            self._roots.require(self.path, os.path.realpath(self.path))
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                is_file = isinstance(error, NotADirectoryError)
                raise AdapterNotFoundError.of(no_folder(str(path), is_file=is_file)) from None
            raise AdapterReadError.of(unreadable(self.path, error)) from error
        try:
            self._roots.require(self.path, _location(self._descriptor))
        except BaseException:
            self.close()
            raise

    def open(self, name: str) -> RegularFile:
        """Opens one of the files for reading.

        Raises:
            AdapterNotFoundError: There is none of this name.
            AdapterFormatError: It is no regular file, or lies outside the roots.
            AdapterReadError: It cannot be opened.
        """
        path = self.path / name
        try:
            found = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._descriptor)
        except OSError as error:
            real = os.path.realpath(f"{_location(self._descriptor)}/{name}")
            self._roots.require(path, real)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise AdapterNotFoundError.of(self._missing(name)) from None
            raise AdapterReadError.of(unreadable(path, error)) from error
        try:
            self._roots.require(path, _location(found))
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise AdapterFormatError.at(
                    Code.NOT_A_FILE, str(path), "not a regular file", "a file"
                )
            descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterReadError.of(unreadable(path, error)) from error
        finally:
            os.close(found)
        return RegularFile(descriptor, path)

    def files(self) -> Iterator[tuple[str, bool]]:
        """Everything below the folder but folders, by its path there; whether it is a link.

        Links are not followed.

        Raises:
            AdapterFormatError: Folders are nested too deeply.
            AdapterReadError: A folder cannot be listed.
        """
        for where, folders, names, descriptor in os.fwalk(
            ".", dir_fd=self._descriptor, onerror=self._raise
        ):
            parent = "" if where == "." else f"{where.removeprefix('./')}/"
            if parent.count("/") > _MAX_NESTED:
                found, expected = "folders nested too deeply", f"at most {_MAX_NESTED}"
                path = str(self.path)
                raise AdapterFormatError.at(Code.NOT_ALLOWED, path, found, expected, verb="has")
            for name in folders:
                if stat.S_ISLNK(_status(name, descriptor).st_mode):
                    yield f"{parent}{name}", True
            for name in names:
                yield f"{parent}{name}", stat.S_ISLNK(_status(name, descriptor).st_mode)

    def _raise(self, error: OSError) -> None:
        raise AdapterReadError.of(unreadable(self.path, error)) from error

    def has(self, name: str, *, follow_links: bool = True) -> bool:
        """Whether there is anything of this name."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=follow_links)
        except OSError:
            return False
        return True

    def _missing(self, name: str) -> Problem:
        entries: list[str] = []
        nested: list[str] = []
        with suppress(OSError):  # the problem is that of the missing file
            listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._descriptor)
            with OpenDescriptor(listing), os.scandir(listing) as found:
                for entry in islice(found, _MAX_LISTED):
                    entries.append(entry.name)
                    config = f"{entry.name}/{CONFIG_NAME}"
                    if entry.is_dir(follow_symlinks=False) and self.has(config, follow_links=False):
                        nested.append(entry.name)
        return no_file(str(self.path), name, entries, nested)


def read_config(file: RegularFile, limits: SizeLimits) -> bytes:
    """The content of an `adapter_config.json`; raises `AdapterError`: too large, or unreadable."""
    size = file.fingerprint.size
    if size > limits.config_bytes:
        raise AdapterFormatError.at(
            Code.FILE_TOO_LARGE,
            str(file.path),
            f"longer than {limits.config_bytes} bytes ({size})",
            "what PEFT's save_pretrained writes",
        )
    return bytes(file.read(size))


def _location(descriptor: int) -> str:
    """Where an open file or folder lies, without links."""
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 (no path to look up)


def _status(name: str, folder: int) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _no_path(path: Path) -> Problem:
    return Problem.at(Code.FOLDER_MISSING, shown_name(str(path)), "", "not a path", EXPECTED)
