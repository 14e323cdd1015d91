"""Requests to servers and to Prometheus, with errors that an operator understands."""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit

from vllm_multilora.errors import MultiLoRAError

TIMEOUT_S = 30.0
_SHOWN = 200
_UNKNOWN_AUTHORITY = range(18, 22)
"""What OpenSSL says where nobody it knows vouches for a certificate."""


class UnreachableError(MultiLoRAError):
    """A server gave no usable answer.

    Attributes:
        status: What it answered with; None where it did not.
        answer: What its answer says, in one line; empty where there was none.
    """

    def __init__(self, message: str, status: int | None = None, answer: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.answer = answer


def base_url(text: str) -> str:
    """A server's address as paths are appended to it; it may be given as OpenAI's clients take it.

    Raises:
        UnreachableError: It is no HTTP address.
    """
    if not _is_address(text):
        raise UnreachableError(
            f"{text!r} is not a server address: expected http://HOST:PORT or https://HOST:PORT "
            f"(of a server with --uds, that of a proxy to its socket)"
        )
    return text.rstrip("/").removesuffix("/v1")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").encode("idna")  # as it is looked up
        parts.port  # noqa: B018 (raises where it is no port)
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and parts.path.isascii()
    return parts.scheme in ("http", "https") and bool(host) and is_plain and "@" not in parts.netloc


def send(
    method: str,
    url: str,
    body: Any = None,
    *,
    query: dict[str, str] | None = None,
    api_key: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """An answer's text; through the environment's proxy, unless the server is on this machine.

    A body is sent as JSON, a key as bearer token; `timeout_s` are seconds without a byte.

    Raises:
        UnreachableError: Nobody answers there, or with another status than 200; or HTTP cannot
            carry the key.
    """
    full = f"{url}?{urlencode(query)}" if query else url
    request = urllib.request.Request(full, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise UnreachableError(
                "HTTP cannot carry the API key: expected printable ASCII characters in one line"
            )
        request.add_header("Authorization", f"Bearer {api_key}")
    proxy = _proxy_for(parts := urlsplit(full))
    handler = urllib.request.ProxyHandler({parts.scheme: proxy} if proxy else {})
    try:
        with urllib.request.build_opener(handler).open(request, timeout=timeout_s) as response:
            content: bytes = response.read()
    except urllib.error.HTTPError as error:
        answer = _message(error.read().decode(errors="replace"))
        what = f": {answer[:_SHOWN]}" if answer else ""
        if error.code == http.HTTPStatus.UNAUTHORIZED:
            hint = "give a key in $VLLM_API_KEY or with --api-key"
            what = f"{what.removesuffix('.')}; {hint}"
        raise UnreachableError(f"{url} answers {error.code}{what}", error.code, answer) from error
    # URLError, a time limit, a broken connection, something that is not HTTP
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        why = _why(reason, parts.scheme)
        through = f" through the proxy {proxy.rpartition('@')[2]}" if proxy else ""
        raise UnreachableError(f"{url} cannot be reached{through}: {why}") from error
    return content.decode(errors="replace")


def _why(reason: Any, scheme: str) -> str:
    """What has gone wrong with a connection, and what may help."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        hint = " (name the certificate of an authority of your own in $SSL_CERT_FILE)"
        is_unknown = reason.verify_code in _UNKNOWN_AUTHORITY
        return f"{reason.verify_message}{hint if is_unknown else ''}"
    said = str(getattr(reason, "strerror", None) or reason)
    if isinstance(reason, ssl.SSLError):
        return f"{said} (does it speak http:// only?)"
    is_cut_off = isinstance(reason, ConnectionResetError) and scheme == "http"
    return f"{said} (does it speak https:// only?)" if is_cut_off else said


def _proxy_for(parts: SplitResult) -> str | None:
    """The proxy that the environment names for an address; None: there is none, or no need.

    What this machine calls itself means another one to a proxy, which would get the key.
    """
    host = parts.hostname or ""
    try:
        is_own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = host == "localhost"
    if is_own or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _message(answer: str) -> str:
    """What an error of vLLM's, Prometheus' or Dynamo's says, in one line; other answers whole."""
    try:
        content = json.loads(answer)
        error = content.get("error", content)
        said = error if isinstance(error, str) else str(error["message"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        said = answer
    return " ".join(said.split())


def get_json(url: str, query: dict[str, str] | None = None, *, api_key: str | None = None) -> Any:
    """The JSON of a GET; raises as `send`, and if the answer is no JSON."""
    text = send("GET", url, query=query, api_key=api_key)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreachableError(f"{url} did not answer with JSON: {text[:_SHOWN]!r}") from error
