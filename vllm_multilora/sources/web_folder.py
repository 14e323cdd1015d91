"""Folders of web servers: `https://host/folder`."""

from __future__ import annotations

import netrc
import os
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from urllib.parse import urlsplit

from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.remote_folder import RemoteFile
from vllm_multilora.sources.source_errors import SourceError, unusable
from vllm_multilora.sources.source_url import SourceUrl
from vllm_multilora.sources.web_client import WebClient, version_of


class WebFolder:
    """A folder whose files are asked for by name: servers list folders each in their own way."""

    def __init__(self, url: SourceUrl, allowed: Sequence[SourceUrl]) -> None:
        self._url = url
        self._allowed = allowed
        self._client = WebClient(self._may_follow, _authorization(url))

    def files(self, names: Sequence[str]) -> list[RemoteFile]:
        return [file for name in names if (file := self._file(name)) is not None]

    def read(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        address = f"{self._url}/{file.name}"
        return self._client.read(address, address, file, begin)

    def _file(self, name: str) -> RemoteFile | None:
        address = f"{self._url}/{name}"
        try:
            answer = self._client.ask(address, address, method="HEAD")
        except SourceError as error:
            if error.failure_kind is FailureKind.GONE:
                return None
            raise
        with closing(answer):
            version, size = version_of(answer.headers), answer.headers.get("Content-Length", "")
        if version is None or not (size.isascii() and size.isdigit()):
            found = "no ETag, no Last-Modified or no Content-Length"
            expected = "headers that tell its version and its size"
            raise unusable(address, found, expected, verb="has", kind=FailureKind.INVALID)
        return RemoteFile(name, int(size), version)

    def _may_follow(self, address: str) -> bool:
        """Redirects lead to other allowed sources only."""
        hosts = {(root.scheme, root.host) for root in self._allowed}
        found = urlsplit(address)
        return (found.scheme, found.netloc.lower()) in hosts


def _authorization(url: SourceUrl) -> str | None:
    """What the user's netrc file has for the host; not for one without encryption."""
    if url.scheme != "https":
        return None
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(url.host.partition(":")[0])
        if known is not None:
            login, _, password = known
            return "Basic " + b64encode(f"{login}:{password}".encode()).decode()
    return None
