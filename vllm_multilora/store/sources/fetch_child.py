"""The process that fetches one adapter.

It says how that went, and stays until the store has heard it: meanwhile what it has fetched is not
removed. It has no host memory, and parses nothing of what customers have written; it alone has
credentials of sources. It may write in the disk cache only, and connect to the ports of allowed
sources only, where the kernel can limit that.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.disk_tier import DiskTier, lease_of
from vllm_multilora.sources.download import Bounds, Fetched, download, remote_folder
from vllm_multilora.sources.source_errors import SourceError, unusable
from vllm_multilora.sources.source_url import SourceUrl, allowed_source, allowed_sources
from vllm_multilora.store.jobs import sandbox
from vllm_multilora.store.memory import syscalls
from vllm_multilora.store.protocol.job_messages import Failure
from vllm_multilora.store.sources.credentials import read_file, read_handed

_ATTEMPTS = 3
_SLACK_BYTES = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_WEB_PORTS = {80, 443, 53}  # of clouds' own addresses and of names; metadata services have port 80
_READABLE = (
    "/etc",
    "/run/systemd/resolve",
    "/usr/share",
    "/usr/local/share",
    "/var/run/secrets",
    "/run/secrets",
    "/proc/self",
    "/sys/fs/cgroup",
    "~/.config/gcloud",
    "~/.azure",
    "~/.netrc",
    "~/.cache/huggingface/token",
)
"""Where resolvers, certificates and credentials are by custom."""

_NAMING_FILES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AZURE_FEDERATED_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "HF_TOKEN_PATH",
    "NETRC",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
)


class FetchRequest(msgspec.Struct, frozen=True):
    """What to fetch, and within which bounds.

    Attributes:
        allowed: URLs that sources, and redirects, must lie below.
        cache: The folder of the disk cache; and its bytes.
        descriptors: The descriptor of credentials, if there is one.
        credentials: A file of more of them, which counts for more.
    """

    url: str
    allowed: tuple[str, ...]
    cache: str
    cache_bytes: int
    bounds: Bounds
    descriptors: tuple[int, ...]
    credentials: str | None


class FetchAnswer(msgspec.Struct, frozen=True):
    """Where the adapter is, and how many bytes that took; or why it cannot be had."""

    folder: str = ""
    nbytes: int = 0
    failure: Failure | None = None


def be_child(request: FetchRequest, sock: socket.socket) -> None:
    """Fetches an adapter, and says how that went."""
    syscalls.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    syscalls.libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    lease = None
    try:
        fetched, lease = _fetched(request)
        answer = FetchAnswer(str(fetched.folder), fetched.nbytes)
    except SourceError as error:
        answer = FetchAnswer(failure=failure_of(error))
    except Exception as error:
        # Nothing of its text: it may be a client library's.
        found = f"fetching {request.url} failed: {type(error).__name__}"
        answer = FetchAnswer(failure=Failure(FailureKind.INTERNAL, found, []))
    sock.sendall(msgspec.json.encode(answer) + b"\n")
    sock.recv(1)  # until it is closed
    if lease is not None:
        os.close(lease)


def _fetched(request: FetchRequest) -> tuple[Fetched, int]:
    url, allowed = SourceUrl.parse(request.url), allowed_sources(request.allowed)
    allowed_source(url, allowed)
    os.environ.update(read_handed(request.descriptors))
    if request.credentials is not None:
        os.environ.update(_credentials(request.credentials))
    tier = _tier(request)
    _confine(request, allowed)
    remote = remote_folder(url, allowed)
    for _ in range(_ATTEMPTS):
        fetched = download(url, remote, tier, request.bounds)
        if (lease := lease_of(fetched.folder)) is not None:
            return fetched, lease
    found = "removed from the disk cache again and again, before it could be read"
    expected = "a cache with room for what is used at a time"
    hint = "raise --multilora-disk-cache-gib"
    raise unusable(str(url), found, expected, hint, kind=FailureKind.NO_MEMORY)


def _tier(request: FetchRequest) -> DiskTier:
    try:
        return DiskTier(request.cache, request.cache_bytes)
    except OSError as error:
        found = f"no folder to write to: {error.strerror}"
        hint = "name another with --multilora-disk-cache"
        raise unusable(request.cache, found, "one for the disk cache", hint) from None


def _credentials(path: str) -> dict[str, str]:
    try:
        return read_file(path)
    except (OSError, ValueError) as error:
        # Whose adapter it is need not know where the file is.
        print(f"multilora store: credentials of sources: {error}", file=sys.stderr, flush=True)
        file = "the server's file of credentials (--multilora-source-credentials)"
        hint = "the log of its store says why"
        raise unusable(file, "not usable", "lines of NAME=value", hint) from None


def _confine(request: FetchRequest, allowed: Sequence[SourceUrl]) -> None:
    """Restricts this process for the rest of its life, as far as the kernel can."""
    most = max(request.bounds.weights_bytes, request.bounds.config_bytes) + _SLACK_BYTES
    for what, limit in ((resource.RLIMIT_FSIZE, most), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):
            resource.setrlimit(what, (limit, limit))
    if syscalls.libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        with suppress(OSError):
            sandbox.enter_landlock(
                (*sandbox.code_paths(), *readable_paths(os.environ)),
                (request.cache,),
                sorted(ports_of(allowed, os.environ)),
            )


def readable_paths(environment: Mapping[str, str]) -> Iterable[str]:
    """Where the client libraries find what they need besides their code."""
    named = [environment[name] for name in _NAMING_FILES if environment.get(name)]
    if home := environment.get("HF_HOME"):
        named.append(f"{home}/token")
    for path in (*_READABLE, *named):
        with suppress(RuntimeError):
            yield str(Path(path).expanduser())


def ports_of(allowed: Sequence[SourceUrl], environment: Mapping[str, str]) -> set[int]:
    """The TCP ports of sources, of servers that the environment names instead, and of proxies."""
    found = set(_WEB_PORTS)
    named = [
        value
        for name, value in environment.items()
        if name.lower().endswith("_proxy")
        or (name.startswith(("AWS_", "AZURE_", "GOOGLE_", "HF_")) and "://" in value)
    ]
    for address in (*named, *(f"{root.scheme}://{root.host}" for root in allowed)):
        with suppress(ValueError):
            if (port := urlsplit(address).port) is not None:
                found.add(port)
    return found


def failure_of(error: SourceError) -> Failure:
    """An error as the store passes it on."""
    problems: list[dict[str, Any]] = [problem.as_dict() for problem in error.problems]
    return Failure(error.failure_kind, str(error), problems).bounded()
