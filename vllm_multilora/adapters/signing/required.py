"""Which versions of adapters may be served: the digests listed in a file.

The file is a JSON object from adapters' names to their digests, as `vllm-multilora digest` prints
it: one digest, or a list of them while one replaces another. An adapter that it does not name may
not be served, unless there is an entry `"*": "any"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.adapters.signing.adapter_digest import DIGITS
from vllm_multilora.documents import DocumentError, WatchedFile, read_json

_OTHERS, _ANY = "*", "any"
_LIST = "serve the expected version, or list this one in the file of --multilora-require-digest"
_DIGEST = re.compile(f"[0-9a-f]{{{DIGITS}}}")


class RequiredDigests:
    """A file of digests, read again when it changes; for one thread; raises `ConfigError`."""

    def __init__(self, path: str) -> None:
        self._file = WatchedFile(path, _parse, "required digests")

    def refuse(self, name: str, digest: str) -> Problem | None:
        """Why an adapter must not be served with a digest; None if it may."""
        self._file.refresh()
        digests = self._file.value
        allowed = digests.get(name)
        if digest in (allowed or ()) or (allowed is None and _OTHERS in digests):
            return None
        expected = " or ".join(sorted(allowed or ["another: none is listed for this name"]))
        return Problem.at(Code.WRONG_DIGEST, name, "digest", digest, expected, hint=_LIST)


def _parse(file: str, text: str) -> Mapping[str, frozenset[str]]:
    content = read_json(file, text)
    if not isinstance(content, dict):
        raise DocumentError(
            f"{file}: expected an object from adapters' names to digests, found "
            f"{type(content).__name__}"
        )
    return {name: _allowed(file, name, value) for name, value in content.items()}


def _allowed(file: str, name: str, value: object) -> frozenset[str]:
    if name == _OTHERS and value == _ANY:
        return frozenset()
    digests = value if isinstance(value, list) else [value]
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise DocumentError(
                f"{file}: {name!r} has {digest!r}, expected a digest of {DIGITS} hexadecimal "
                "digits, as vllm-multilora digest prints it"
            )
    return frozenset(digests)
