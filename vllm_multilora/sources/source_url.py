"""URLs of adapters, and which of them a server allows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.adapters.problems import Code, shown_name
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.source_errors import SourceError

OBJECT_STORES = {"s3": "Amazon S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
"""Schemes of object stores; the host is the bucket, or the container."""

SCHEMES = (*OBJECT_STORES, "hf", "https", "http")

_EXPECTED = (
    "s3://bucket/folder, gs://bucket/folder, az://container/folder, hf://owner/repository@revision "
    "or https://host/folder"
)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?::\d{1,5})?")
_PRINTABLE = re.compile(r"[!-~]+(?: [!-~]+)*")
_REVISION = re.compile(r"[\w][\w./-]*")


@dataclass(frozen=True)
class SourceUrl:
    """A folder that is elsewhere, or a prefix of such folders.

    Attributes:
        scheme: One of `SCHEMES`.
        host: Bucket, container, owner of repositories, or host with its port.
        parts: The path's parts; of a repository, its name is the first.
        revision: Branch, tag or commit of a repository; None: its main branch.
    """

    scheme: str
    host: str
    parts: tuple[str, ...]
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> SourceUrl:
        """Reads a URL; raises `SourceError` for what names no folder, or more than one."""
        if (fault := _fault(text)) is not None:
            raise SourceError.at(Code.FOLDER_MISSING, _shown(text), fault, _EXPECTED, verb="has")
        scheme, _, rest = text.partition("://")
        host, _, path = rest.partition("/")
        parts, revision = [part for part in path.split("/") if part], None
        if scheme == "hf" and parts and "@" in parts[0]:
            parts[0], _, revision = parts[0].partition("@")
        if scheme.startswith("http"):
            host = host.lower()
        return cls(scheme, host, tuple(parts), revision)

    def __str__(self) -> str:
        parts = list(self.parts)
        if self.revision is not None:
            parts[0] += f"@{self.revision}"
        return "/".join((f"{self.scheme}://{self.host}", *parts))

    @property
    def prefix(self) -> str:
        """The path of a file in the folder, without the file's name."""
        return "".join(f"{part}/" for part in self.parts)

    def allows(self, other: SourceUrl) -> bool:
        """Whether a folder is this one or lies below it."""
        return (
            (self.scheme, self.host) == (other.scheme, other.host)
            and self.parts == other.parts[: len(self.parts)]
            and self.revision in (None, other.revision)
        )


def _shown(text: str) -> str:
    """A URL without what may be a secret."""
    scheme, _, rest = re.split("[?#]", text)[0].partition("://")
    return shown_name(f"{scheme}://{rest.rpartition('@')[2]}")


def _fault(text: str) -> str | None:
    """What keeps a text from being the URL of a folder."""
    scheme, _, rest = text.partition("://")
    host, _, path = rest.partition("/")
    if scheme not in SCHEMES:
        return f"the scheme {shown_name(scheme)!r}"
    if "@" in host:
        return "a user or a password in it: name credentials apart from URLs"
    if not _HOST.fullmatch(host):
        return f"the host or bucket {shown_name(host)!r}"
    if "?" in path or "#" in path:
        return "a query or a fragment: name credentials apart from URLs"
    if path and not _PRINTABLE.fullmatch(path):
        return "characters that are not printable ASCII"
    web = scheme.startswith("http")
    for part in (unquote(path) if web else path).removesuffix("/").split("/"):
        if part in (".", "..") or "\\" in part or (not part and path):
            return f"a part {part!r}"
    if web and "%2f" in path.lower():
        return "an escaped slash"
    name, at, revision = path.partition("/")[0].partition("@")
    if scheme == "hf" and at and not (name and _REVISION.fullmatch(revision)):
        return f"the revision {shown_name(revision)!r}"
    return None


def is_source(path: str) -> bool:
    """Whether a path is a URL of a kind that is fetched; frameworks have schemes of their own."""
    return path.partition("://")[0] in SCHEMES


def allowed_sources(roots: Iterable[str]) -> tuple[SourceUrl, ...]:
    """The URLs among the allowed roots; raises `SourceError` for one that is none."""
    return tuple(SourceUrl.parse(root) for root in roots if is_url(root))


def allowed_source(url: SourceUrl, allowed: Iterable[SourceUrl]) -> SourceUrl:
    """The allowed root that a folder lies below; raises `SourceError`."""
    for root in allowed:
        if root.allows(url):
            return root
    raise SourceError.at(
        Code.NOT_ALLOWED,
        str(url),
        "outside the sources that adapters may come from",
        "a URL below one of them",
        hint=f"to allow it, start the server with --multilora-allowed-roots {_suggested(url)}",
        kind=FailureKind.INVALID,
    )


def _suggested(url: SourceUrl) -> str:
    above = SourceUrl(url.scheme, url.host, url.parts[:-1])
    return f"{above}/" if url.scheme != "hf" else str(SourceUrl("hf", url.host, url.parts[:1]))
