"""Requests to web servers: redirects that stay where they may lead, exact errors, no surprises."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from vllm_multilora.sources.remote_folder import CHUNK_BYTES, READ_S, RemoteFile
from vllm_multilora.sources.source_errors import of_status, replaced, unreachable

_AGENT = "vllm-multilora"
_MAX_REDIRECTS = 5


class WebClient:
    """Asks web servers, over proxies where the environment names any.

    Args:
        may_follow: Whether a redirect to an address may be followed, besides those that stay on the
            host that was asked.
        authorization: Header for the host that is asked, and for no other.
    """

    def __init__(self, may_follow: Callable[[str], bool], authorization: str | None = None) -> None:
        self._authorization = authorization
        self._opener = urllib.request.build_opener(_Redirects(may_follow))

    def ask(self, url: str, file: str, *, method: str = "GET", **headers: str) -> Any:
        """The answer, open; `file` is what errors name; raises `SourceError`."""
        sent = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, headers=sent, method=method)
        if self._authorization is not None:
            # A redirect to another host does not take these along.
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._opener.open(request, timeout=READ_S)
        except urllib.error.HTTPError as error:
            with closing(error):
                raise of_status(file, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(file, error) from None

    def read(self, url: str, where: str, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """A file's bytes from one on, of the listed version; raises `SourceError`."""
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        if begin and file.version.startswith('"'):
            headers["If_Match"] = file.version
        with closing(self.ask(url, where, **headers)) as answer:
            found = version_of(answer.headers)
            is_other = found not in (None, file.version) and not file.version.isalnum()  # a commit
            size, skipped = _whole_size(answer), 0 if answer.status == 206 else begin
            if is_other or size not in (None, file.size):
                raise replaced(where)
            try:
                while piece := answer.read1(CHUNK_BYTES):
                    if skipped:  # a server that sends all of it again
                        piece, skipped = piece[skipped:], max(0, skipped - len(piece))
                    yield piece
            except (OSError, http.client.HTTPException) as error:
                raise _unreachable(where, error) from None


def version_of(headers: Message | Mapping[str, str]) -> str | None:
    """What tells one version of a file from another; None where the server says nothing."""
    if etag := headers.get("ETag"):
        return etag
    changed = headers.get("Last-Modified")
    return f"at {changed}" if changed else None


def _whole_size(answer: Any) -> int | None:
    """Bytes of the whole file, as an answer with all or a part of it says."""
    if answer.status == 206:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _MAX_REDIRECTS

    def __init__(self, may_follow: Callable[[str], bool]) -> None:
        self._may_follow = may_follow

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        stays = (before.scheme, before.netloc.lower()) == (after.scheme, after.netloc.lower())
        if not stays and not self._may_follow(newurl):
            return None  # the answer is the redirect itself, which is no file
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None:
            followed.method = req.get_method()
            if stays and "Authorization" in req.unredirected_hdrs:
                value = req.unredirected_hdrs["Authorization"]
                followed.add_unredirected_header("Authorization", value)
        return followed


def _unreachable(file: str, error: Exception) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return unreachable(file, f"no answer within {READ_S:g} s", is_timeout=True)
    if isinstance(reason, OSError) and reason.strerror:
        return unreachable(file, reason.strerror)
    return unreachable(file, f"the connection broke ({type(reason).__name__})")
