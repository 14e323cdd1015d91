"""Turns a tenants file's data into tenants; the first fault is an error with its place."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm_multilora.documents import Document, DocumentError, Keys, read_document, read_file
from vllm_multilora.tenants.keys import read_stored
from vllm_multilora.tenants.tenant import (
    ALLOWABLE,
    MAX_WEIGHT,
    AllowedNames,
    Tenant,
    TenantLimits,
    Tenants,
    is_weight,
)
from vllm_multilora.wording import counted

MIN_SALT_LENGTH = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOP = ("tenants", "cache_salt")
_TENANT = ("keys", "adapters", "routes", "base_model", "weight", "limits", "allow")
_LIMITS = ("running", "waiting", "tokens_per_minute", "adapters", "resident", "answers")


def load_tenants(path: str | os.PathLike[str]) -> Tenants:
    """Reads a tenants file.

    Raises:
        DocumentError: It cannot be read, or something in it is wrong.
    """
    return read_file(path, parse_tenants, "tenants")


def parse_tenants(file: str, text: str) -> Tenants:
    """Reads tenants of a text; the file's name is for messages, and to tell JSON from YAML.

    Raises:
        DocumentError: With the file, the line or key, what was found and what was expected. Keys
            and the salt are never shown.
    """
    document = read_document(file, text)
    parser = _Parser(document)
    top = parser.mapping(document.data, (), _TOP)
    if "tenants" not in top:
        raise document.error((), "found no key tenants, expected tenants by name")
    found = top["tenants"]
    if not isinstance(found, dict):
        raise document.error(
            ("tenants",), f"found {_kind(found)}, expected tenants by name, or {{}} for none"
        )
    tenants = {name: parser.tenant(name, data) for name, data in found.items()}
    return Tenants(tenants, parser.keys, parser.salt(top.get("cache_salt")))


class _Parser:
    """Makes tenants of a document's data; keeps whose the keys are that have been read."""

    def __init__(self, document: Document) -> None:
        self._check_keys, self._error = document.check_keys, document.error
        self.keys: dict[bytes, str] = {}

    def _wrong(self, place: Keys, found: Any, expected: str) -> DocumentError:
        return self._error(place, f"found {_kind(found)}, expected {expected}")

    def mapping(self, data: Any, place: Keys, known: Collection[str]) -> Mapping[str, Any]:
        if not isinstance(data, dict):
            raise self._wrong(place, data, ", ".join(known))
        self._check_keys(place, data, known)
        return data

    def salt(self, data: Any) -> str | None:
        if data is None:
            return None
        if not isinstance(data, str) or len(data) < MIN_SALT_LENGTH:
            expected = f"at least {MIN_SALT_LENGTH} random characters"
            raise self._wrong(("cache_salt",), data, expected)
        return data

    def tenant(self, name: str, data: Any) -> Tenant:
        place: Keys = ("tenants", name)
        if _NAME.fullmatch(name) is None:
            raise self._error(
                place,
                "found this name, expected 1 to 64 ASCII letters, digits, dots, dashes or _, the "
                "first a letter or a digit",
            )
        found = self.mapping(data, place, _TENANT)
        self._read_keys(name, found.get("keys"), (*place, "keys"))
        base_model = found.get("base_model", False)
        if not isinstance(base_model, bool):
            raise self._wrong((*place, "base_model"), base_model, "true or false")
        weight = found.get("weight", 1.0)
        if not is_weight(weight):
            expected = f"a number above 0, at most {MAX_WEIGHT}"
            raise self._wrong((*place, "weight"), weight, expected)
        return Tenant(
            name,
            self._names(found.get("adapters"), (*place, "adapters")),
            self._names(found.get("routes"), (*place, "routes")),
            base_model,
            float(weight),
            self._limits(found.get("limits"), (*place, "limits")),
            self._allow(found.get("allow"), (*place, "allow")),
        )

    def _read_keys(self, name: str, data: Any, place: Keys) -> None:
        if not isinstance(data, list) or not data:
            raise self._wrong(place, data, "a list of hashed keys, at least one")
        for number, text in enumerate(data):
            at = (*place, str(number))
            try:
                digest = read_stored(text if isinstance(text, str) else "")
            except ValueError as error:
                raise self._error(
                    at,
                    f"found something other than a hashed key, {error}: vllm-multilora tenants "
                    f"hash makes one from the key",
                ) from None
            if (owner := self.keys.setdefault(digest, name)) != name:
                raise self._error(
                    at, f"found a key that {owner!r} has, too, expected a different one"
                )

    def _names(self, data: Any, place: Keys) -> AllowedNames:
        expected = "a name, or the beginning of names and one * at its end"
        names = self._texts(data, place, "names", expected, lambda name: "*" not in name[:-1])
        return AllowedNames(tuple(dict.fromkeys(names)))

    def _allow(self, data: Any, place: Keys) -> frozenset[str]:
        words = ", ".join(ALLOWABLE)
        is_word = ALLOWABLE.__contains__
        return frozenset(self._texts(data, place, words, f"one of {words}", is_word))

    def _texts(
        self, data: Any, place: Keys, what: str, expected: str, is_good: Callable[[str], bool]
    ) -> list[str]:
        """A list of texts that are not empty and are what is expected; nothing is an empty one."""
        if data is not None and not isinstance(data, list):
            raise self._wrong(place, data, f"a list of {what}")
        for number, text in enumerate(data or ()):
            if not (isinstance(text, str) and text and is_good(text)):
                raise self._wrong((*place, str(number)), text, expected)
        return data or []

    def _limits(self, data: Any, place: Keys) -> TenantLimits:
        if data is None:
            return TenantLimits()
        found = self.mapping(data, place, _LIMITS)
        for key, value in found.items():
            least = 0 if key == "waiting" else 1
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or value < least:
                raise self._wrong((*place, key), value, f"a whole number of {least} or more")
        return TenantLimits(**found)


def _kind(value: Any) -> str:
    """What a value is, without showing more of it than a number or a short name."""
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, str):
        return f"a text of {counted(len(value), 'character')}"
    return "a list" if isinstance(value, list) else "a mapping"
