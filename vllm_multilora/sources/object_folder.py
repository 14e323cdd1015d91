"""Folders of object stores: `s3://bucket/folder`, `gs://bucket/folder`, `az://container/folder`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_multilora.adapters.problems import Code
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.remote_folder import READ_S, RemoteFile
from vllm_multilora.sources.source_errors import SourceError, of_status, replaced, unreachable
from vllm_multilora.sources.source_url import OBJECT_STORES, SourceUrl

_STATUS = re.compile(r"status code: (\d{3})|\((\d{3}) [A-Z]")
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")
_TIMEOUT = re.compile(r"timed out|kind: Time")  # and not its settings, which it prints as well


class ObjectFolder:
    """A folder of a bucket, by `obstore`; credentials are those that it finds by itself."""

    def __init__(self, url: SourceUrl) -> None:
        try:
            from obstore.store import from_url
        except ImportError:
            found = f"in {OBJECT_STORES[url.scheme]}, and obstore is not installed"
            hint, kind = "pip install vllm-multilora[remote]", FailureKind.INVALID
            raise SourceError.at(
                Code.FOLDER_MISSING, str(url), found, "what reads it", hint=hint, kind=kind
            ) from None
        self._url = url
        # Which of these it knows, it takes from the environment by itself.
        client: Any = {
            "allow_http": _has_open_endpoint(),
            "connect_timeout": f"{READ_S:g}s",
            "timeout": "1h",  # of a whole file
        }
        try:
            # Attempts are counted where progress is known.
            self._store: Any = from_url(
                f"{url.scheme}://{url.host}",
                client_options=client,
                retry_config={"max_retries": 0},
            )
        except Exception as error:
            raise SourceError.at(
                Code.NOT_ALLOWED,
                str(url),
                f"in {OBJECT_STORES[url.scheme]}, whose settings or credentials cannot be used "
                f"({type(error).__name__})",
                "those that obstore understands",
                kind=FailureKind.INVALID,
            ) from None

    def files(self, names: Sequence[str]) -> list[RemoteFile]:
        return [file for name in names if (file := self._file(name)) is not None]

    def read(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        path = self._url.prefix + file.name
        options: dict[str, Any] = {"range": (begin, file.size)} if begin else {}
        version, _, etag = file.version.partition(" ")
        if etag:
            options["if_match"] = etag
        if version:
            options["version"] = version
        try:
            answer = self._store.get(path, options=options)
            if answer.meta["size"] != file.size:
                raise replaced(f"{self._url}/{file.name}")
            for piece in answer.stream(min_chunk_size=1):  # larger ones are lost where it breaks
                yield bytes(piece)
        except SourceError:
            raise
        except Exception as error:
            raise self._error(file.name, error) from None

    def _file(self, name: str) -> RemoteFile | None:
        try:
            found = self._store.head(self._url.prefix + name)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._error(name, error) from None
        # Google's version ids are generations, which change with each upload, as ETags do.
        return RemoteFile(name, found["size"], f"{found['version'] or ''} {found['e_tag'] or ''}")

    def _error(self, name: str, error: Exception) -> SourceError:
        """What obstore's error means; its text holds requests and answers, and is not passed on."""
        file, text = f"{self._url}/{name}", str(error)
        kind = type(error).__name__
        known = {
            "FileNotFoundError": 404,
            "NotFoundError": 404,
            "PermissionError": 403,
            "PermissionDeniedError": 403,
            "UnauthenticatedError": 401,
            "PreconditionError": 412,
        }
        if kind in known:
            return of_status(file, known[kind])
        if (found := _STATUS.search(text)) is not None:
            return of_status(file, int(found[1] or found[2]))
        if _TIMEOUT.search(text):
            return unreachable(file, f"no answer within {READ_S:g} s", is_timeout=True)
        return unreachable(file, f"the connection could not be made, or broke ({kind})")


def _has_open_endpoint() -> bool:
    """Whether the environment names a server without encryption instead of a cloud's own."""
    named = (text for name, text in os.environ.items() if name.startswith(_CLOUDS))
    return any(text.startswith("http://") for text in named)
