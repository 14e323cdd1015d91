"""Fetches an adapter: lists its files, makes room, and downloads what is not on disk yet."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.signing.signature import SIGNATURE_NAME
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.disk_tier import DiskTier
from vllm_multilora.sources.remote_folder import RemoteFile, RemoteFolder
from vllm_multilora.sources.source_errors import SourceError, replaced, unreachable, unusable
from vllm_multilora.sources.source_url import OBJECT_STORES, SourceUrl

MAX_ATTEMPTS = 6
"""Attempts in a row that bring nothing; with the pauses between them, about five seconds."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.15, 2.0
_SIGNED_TOO = (SIGNATURE_NAME, "README.md")  # PEFT writes the latter beside an adapter
_T = TypeVar("_T")


@dataclass(frozen=True)
class Bounds:
    """What may be fetched.

    Attributes:
        config_bytes: Of `adapter_config.json`, and of any other file beside the weights.
        weights_bytes: Of `adapter_model.safetensors`.
        patience_s: Seconds without a byte after which a source is given up.
        is_signed: Whether the signature is fetched, too.
    """

    config_bytes: int
    weights_bytes: int
    patience_s: float
    is_signed: bool = False


@dataclass(frozen=True)
class Fetched:
    """An adapter on disk, and how many bytes it took to get it there: none if it was there."""

    folder: Path
    nbytes: int


def remote_folder(url: SourceUrl, allowed: Sequence[SourceUrl]) -> RemoteFolder:
    """The folder at a URL; `allowed` are the sources that redirects may lead to.

    Raises:
        SourceError: What it takes to read it is not installed.
    """
    # Late: each fetch needs one of these.
    if url.scheme in OBJECT_STORES:
        from vllm_multilora.sources.object_folder import ObjectFolder

        return ObjectFolder(url)
    if url.scheme == "hf":
        from vllm_multilora.sources.repository_folder import RepositoryFolder

        return RepositoryFolder(url)
    from vllm_multilora.sources.web_folder import WebFolder

    return WebFolder(url, allowed)


def download(url: SourceUrl, remote: RemoteFolder, tier: DiskTier, bounds: Bounds) -> Fetched:
    """Has an adapter on disk, in the version that its source has now.

    Raises:
        SourceError: It cannot be had, and why.
    """
    names = (CONFIG_NAME, TENSORS_NAME, *(_SIGNED_TOO if bounds.is_signed else ()))
    files = _with_patience(lambda: remote.files(names), bounds.patience_s)
    _check(url, files, bounds)
    key, nbytes = _key(url, files), sum(file.size for file in files)
    if (folder := tier.find(key, nbytes)) is not None:
        return Fetched(folder, 0)
    try:
        with tier.fetching(key, nbytes, bounds.patience_s) as incoming:
            if incoming is None:
                folder = tier.find(key, nbytes)
                assert folder is not None
                return Fetched(folder, 0)
            count = sum(
                _get(url, remote, file, incoming.folder, bounds.patience_s) for file in files
            )
            return Fetched(tier.publish(incoming, key, nbytes), count)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise _disk_error(error) from None


def _check(url: SourceUrl, files: Sequence[RemoteFile], bounds: Bounds) -> None:
    """Raises `SourceError` for an adapter that is not whole, or too large."""
    sizes = {file.name: file.size for file in files}
    for name in (CONFIG_NAME, TENSORS_NAME):
        if name not in sizes:
            expected = f"a folder that holds {CONFIG_NAME} and {TENSORS_NAME}"
            raise SourceError.at(Code.FILE_MISSING, f"{url}/{name}", "missing", expected)
    for name, size in sizes.items():
        most = bounds.weights_bytes if name == TENSORS_NAME else bounds.config_bytes
        if size > most:
            file, expected = f"{url}/{name}", f"at most {most} for this model"
            kind = FailureKind.INVALID
            raise SourceError.at(
                Code.FILE_TOO_LARGE, file, f"{size} bytes", expected, verb="has", kind=kind
            )


def _key(url: SourceUrl, files: Sequence[RemoteFile]) -> str:
    """What stands for a folder in one version: the same for all revisions that lead to it."""
    source = str(SourceUrl(url.scheme, url.host, url.parts))
    facts = [source, sorted((file.name, file.size, file.version) for file in files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def _get(
    url: SourceUrl, remote: RemoteFolder, file: RemoteFile, folder: Path, patience_s: float
) -> int:
    """Downloads a file, on from where an earlier attempt was cut off; returns its new bytes."""
    path, name = folder / file.name, f"{url}/{file.name}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as out:
        begin = os.fstat(descriptor).st_size
        if begin > file.size:
            out.truncate(begin := 0)
        progress = _Progress(patience_s)
        have = begin
        while have < file.size:
            try:
                for piece in remote.read(file, have):
                    if have + len(piece) > file.size:
                        raise replaced(name)
                    have += len(piece)
                    while piece:  # a disk that is nearly full takes a part
                        piece = piece[out.write(piece) :]
                    progress.made()
                if have < file.size:
                    raise unreachable(name, f"it ends after {have} of {file.size} bytes")
            except SourceError as error:
                progress.failed(error)
        os.fsync(descriptor)
    return have - begin


def _with_patience(work: Callable[[], _T], patience_s: float) -> _T:
    progress = _Progress(patience_s)
    while True:
        try:
            return work()
        except SourceError as error:
            progress.failed(error)


class _Progress:
    """Counts attempts that bring nothing, and waits between them."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.made()

    def made(self) -> None:
        self._failures, self._since = 0, time.monotonic()

    def failed(self, error: SourceError) -> None:
        """Waits for the next attempt; raises the error where there is to be none."""
        self._failures += 1
        pause = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        left = self._since + self._patience_s - time.monotonic()
        if not error.is_passing or self._failures >= MAX_ATTEMPTS or left < pause:
            raise error
        time.sleep(pause)


def _disk_error(error: OSError) -> SourceError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    kind = FailureKind.NO_MEMORY if is_full else FailureKind.UNREADABLE
    found, expected = f"not usable: {error.strerror}", "room on its disk, and access to it"
    return unusable("the disk cache (--multilora-disk-cache)", found, expected, kind=kind)
