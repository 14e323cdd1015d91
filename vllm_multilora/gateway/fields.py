"""Checks the body of a tenant's call against the table of fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.gateway.table import (
    FREE_KEYS,
    GRAMMAR_KEYS,
    GRAMMAR_TYPES,
    LONG_KEYS,
    MAX_ITEMS,
    MAX_NUMBERS,
    MEDIA_KEYS,
    MEDIA_TYPES,
    MESSAGE_KEYS,
    MESSAGE_TYPES,
    URL_KEYS,
    Route,
)
from vllm_multilora.tenants.tenant import GRAMMARS, MEDIA
from vllm_multilora.wording import listed

MAX_DEPTH = 64
"""Levels of lists and objects in each other. The engine reads some values by recursion."""

MAX_SHORT_TEXT = 1_024
"""Characters of a text that is neither prompt nor content, and of any key. Errors repeat such
texts, and vLLM searches errors in a time that grows with the cube of their length."""

MAX_TEXT = 4 << 20
"""Characters of any other text but media: some seconds of a thread that makes tokens of texts."""

MAX_NAMED = 8
"""Unknown fields that a refusal names."""

MAX_INTEGER = (1 << 63) - 1
"""The largest whole number, and with the other sign the smallest. vLLM keeps a request for ever
that it cannot send to its engine: for a number of more than 64 bits, or half of a character."""

_NUMBERS = frozenset((int, float, bool))
_SHOWN = 64  # characters of a name that a refusal shows


class FieldError(MultiLoRAError):
    """A body has something that its sender may not send.

    Attributes:
        param: The top-level field that is at fault; None where it is the whole body.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def needs(word: str | None) -> str:
    """The end of a refusal of what an operator could allow by a word, or of what nobody can."""
    if word is None:
        return "not allowed for tenants"
    return f"not allowed for this tenant: the server's operator has not allowed `{word}`"


def check_body(body: Any, route: Route, allow: Collection[str]) -> dict[str, Any]:
    """Looks at all of a call's body, which is parsed JSON, before vLLM sees it.

    The tenants file allows the tenant some words besides what the route allows.

    Returns:
        Fields that are to be set in it.

    Raises:
        FieldError: Something in it is not allowed.
    """
    if not isinstance(body, dict):
        raise FieldError(f"The body is {_kind(body)}, expected a JSON object.")
    if unknown := [name for name in body if name not in route.known]:
        raise FieldError(
            f"Fields that are not allowed here: {_listed(unknown)}.", _shortened(unknown[0])
        )
    for name, value in body.items():
        gate = route.gated.get(name)
        if gate and value is not None and gate.word not in allow and not gate.is_harmless(value):
            raise FieldError(f"`{name}` is {needs(gate.word)}.", name)
        _require_few(name, value)
        check = _Check(name, allow)
        if name in route.contents:
            check.content(value, 1, is_long=True)
        else:
            is_trusted = gate is not None and gate.word in allow
            check.any(value, 1, is_long=is_trusted or name in route.documents)
    return {
        name: gate.written
        for name, gate in route.gated.items()
        if gate.written is not None and gate.word not in allow and body.get(name) is None
    }


def _require_few(name: str, value: Any) -> None:
    most = MAX_ITEMS.get(name)
    if most is not None and isinstance(value, (list, dict)) and len(value) > most:
        raise _unexpected(name, f"{len(value)} items", f"{most} at most")
    largest = MAX_NUMBERS.get(name)
    if largest is None or value is None:
        return
    is_number = isinstance(value, (int, float))  # vLLM would also take a text that has one in it
    if not (is_number and abs(value) <= largest):
        found = "a larger one" if is_number else _kind(value)
        raise _unexpected(name, found, f"a number, {largest} at most")


def _unexpected(name: str, found: str, expected: str) -> FieldError:
    return FieldError(f"`{name}`: found {found}, expected {expected}.", name)


class _Check:
    """The values of one field of a tenant with some words in its `allow`."""

    def __init__(self, name: str, allow: Collection[str]) -> None:
        self._name = name
        self._keys, self._types = MESSAGE_KEYS, MESSAGE_TYPES
        if MEDIA in allow:
            self._keys, self._types = self._keys | MEDIA_KEYS, self._types | MEDIA_TYPES
        if GRAMMARS in allow:
            self._keys, self._types = self._keys | GRAMMAR_KEYS, self._types | GRAMMAR_TYPES

    def any(self, value: Any, depth: int, *, is_long: bool, is_url: bool | None = None) -> None:
        """Checks any JSON.

        Args:
            value: The JSON.
            depth: Its level; 1 for a field's value.
            is_long: Whether texts in it may be long.
            is_url: Whether texts in it must be `data:` URLs; None where the field's name says so.
        """
        is_url = self._name in URL_KEYS if is_url is None else is_url
        if isinstance(value, str):
            self._text(value, is_long=is_long, is_url=is_url)
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, list):
            self._enter(depth)
            self._integer(max((v for v in value if type(v) is int), key=abs, default=0))
            for item in _without_numbers(value):
                self.any(item, depth + 1, is_long=is_long, is_url=is_url)
        elif isinstance(value, dict):
            self._enter(depth)
            for key, item in value.items():
                self._text(key, is_long=False, is_url=False, kind="key")
                self.any(item, depth + 1, is_long=is_long, is_url=is_url)

    def content(self, value: Any, depth: int, *, is_long: bool, is_url: bool = False) -> None:
        """Checks prompts, messages and their parts; arguments as for `any`."""
        if isinstance(value, str):
            self._text(value, is_long=is_long, is_url=is_url)
        elif isinstance(value, list):
            self._enter(depth)
            for item in _without_numbers(value):
                self.content(item, depth + 1, is_long=is_long, is_url=is_url)
        elif isinstance(value, dict):
            self._enter(depth)
            self._object(value, depth)

    def _object(self, value: dict[str, Any], depth: int) -> None:
        if unknown := [key for key in value if key not in self._keys]:
            raise FieldError(
                f"`{self._name}` has objects with keys that are not allowed for this tenant: "
                f"{_listed(unknown)}.",
                self._name,
            )
        kind = value.get("type")
        if kind is not None and not (isinstance(kind, str) and kind in self._types):
            shown = _shortened(kind) if isinstance(kind, str) else _kind(kind)
            raise FieldError(
                f"`{self._name}` has an object whose type is not allowed for this tenant: {shown}.",
                self._name,
            )
        for key, item in value.items():
            if key in FREE_KEYS:
                self.any(item, depth + 1, is_long=True, is_url=False)
            elif key != "data" or not isinstance(item, str):  # that is a recording, say
                self.content(item, depth + 1, is_long=key in LONG_KEYS, is_url=key in URL_KEYS)

    def _enter(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            found = f"lists and objects in each other that are deeper than {MAX_DEPTH} levels"
            raise _unexpected(self._name, found, f"{MAX_DEPTH} at most")

    def _integer(self, number: int) -> None:
        if abs(number) > MAX_INTEGER:
            found = "a number of more than 64 bits"
            raise _unexpected(self._name, found, f"{MAX_INTEGER} at most")

    def _text(self, text: str, *, is_long: bool, is_url: bool, kind: str = "text") -> None:
        if not is_unicode(text):
            raise _unexpected(self._name, "half of a surrogate pair", "Unicode")
        if is_url and not text.startswith("data:"):
            expected = "a `data:` URL: tenants send images and the like in the request itself"
            raise _unexpected(self._name, "an address", expected)
        most = MAX_TEXT if is_long else MAX_SHORT_TEXT
        if not is_url and len(text) > most:
            raise _unexpected(self._name, f"a {kind} of {len(text)} characters", f"{most} at most")


def is_unicode(text: str) -> bool:
    """Whether a text can be sent: JSON may name half of a surrogate pair, which is no character."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _without_numbers(items: list[Any]) -> list[Any]:
    """The items to look at; a list of tokens may have a hundred thousand, and has none."""
    return [] if _NUMBERS.issuperset(map(type, items)) else items


def _listed(names: list[str]) -> str:
    return listed([f"`{_shortened(name)}`" for name in names], MAX_NAMED)


def _shortened(name: str) -> str:
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return shown.encode("utf-8", "backslashreplace").decode()


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), "a number")
