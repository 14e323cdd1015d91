"""Repositories of the Hugging Face hub: `hf://owner/repository@revision/folder`.

Not by `huggingface_hub`, which begins broken downloads anew, and takes a second to import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, urlsplit

from vllm_multilora.adapters.problems import Code
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.remote_folder import RemoteFile
from vllm_multilora.sources.source_errors import SourceError, unusable
from vllm_multilora.sources.source_url import SourceUrl
from vllm_multilora.sources.web_client import WebClient

DEFAULT_ENDPOINT = "https://huggingface.co"
STORAGE = (".hf.co", ".huggingface.co")
"""Hosts below these keep the hub's large files: redirects may lead there."""

_MAX_LISTING = 32 << 20


class RepositoryFolder:
    """A folder of a repository, at the commit that its revision leads to when it is listed."""

    def __init__(self, url: SourceUrl) -> None:
        if not url.parts:
            raise SourceError.at(
                Code.FOLDER_MISSING, str(url), "no repository", "hf://owner/repository"
            )
        self._url = url
        self._repository = f"{url.host}/{url.parts[0]}"
        self._folder = "".join(f"{part}/" for part in url.parts[1:])
        self._endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        token = _token()
        self._client = WebClient(_may_follow, token and f"Bearer {token}")

    def files(self, names: Sequence[str]) -> list[RemoteFile]:
        commit, sizes = self._listing
        found = [(name, sizes.get(self._folder + name)) for name in names]
        return [RemoteFile(name, size, commit) for name, size in found if size is not None]

    def read(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        path = quote(f"{self._folder}{file.name}")
        address = f"{self._endpoint}/{self._repository}/resolve/{file.version}/{path}"
        return self._client.read(address, f"{self._url}/{file.name}", file, begin)

    @cached_property
    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit, and each file's size."""
        revision = quote(self._url.revision or "main", safe="")
        address = f"{self._endpoint}/api/models/{self._repository}/revision/{revision}?blobs=true"
        with closing(self._client.ask(address, str(self._url))) as answer:
            content = answer.read(_MAX_LISTING)
        try:
            listing = json.loads(content)
            sizes = {str(one["rfilename"]): int(one["size"]) for one in listing["siblings"]}
            commit = str(listing["sha"])
        except (ValueError, KeyError, TypeError):
            found = "a listing that cannot be understood"
            expected, kind = f"what {DEFAULT_ENDPOINT}/api/models answers", FailureKind.INVALID
            raise unusable(str(self._url), found, expected, verb="has", kind=kind) from None
        if not commit.isalnum():
            raise unusable(str(self._url), "no commit", "a commit", verb="has")
        return commit, sizes


def _may_follow(address: str) -> bool:
    found = urlsplit(address)
    host = found.hostname or ""
    return found.scheme == "https" and host.endswith(STORAGE)


def _token() -> str | None:
    """The hub's token, from where `huggingface_hub` looks for it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
    with suppress(OSError, RuntimeError):
        return path.expanduser().read_text().strip() or None
    return None
