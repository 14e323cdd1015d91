"""Turns a routes file's data into routes; the first fault is an error with its place."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_multilora.adapters.blend import BlendError, weights_in
from vllm_multilora.documents import Document, DocumentError, Keys, read_document, read_file
from vllm_multilora.routing.request_facts import FactSource
from vllm_multilora.routing.route_targets import (
    MAX_WEIGHT,
    Blended,
    Cases,
    Named,
    Split,
    Target,
    WithFallback,
)

_TARGET_KEYS = ("adapter", "blend", "split", "sticky", "by", "cases", "default", "fallback")
_EXPECTED_TARGET = (
    "an adapter's name, or a mapping with one of adapter, blend (weights), split (weights) or by "
    "(with cases)"
)


@dataclass(frozen=True)
class Routes:
    """The routes of one file: where each name leads."""

    document: Document
    targets: Mapping[str, Target]

    def check_names(self, taken: Collection[str], kind: str) -> None:
        """Checks that no route has the name of something else of a kind.

        Raises:
            DocumentError: A route has one of the names that are taken.
        """
        for name in self.targets:
            if name in taken:
                raise self.document.error(
                    ("routes", name), f"found the name of {kind}, expected a name of its own"
                )

    def unknown(self, known: Collection[str]) -> dict[str, list[str]]:
        """For each route, the names it leads to that are not among those served."""
        missing = {
            route: [name for name in dict.fromkeys(target.names()) if name not in known]
            for route, target in self.targets.items()
        }
        return {route: names for route, names in missing.items() if names}


def load_routes(path: str | os.PathLike[str]) -> Routes:
    """Reads a routes file.

    Raises:
        DocumentError: It cannot be read, or something in it is wrong.
    """
    return read_file(path, parse_routes, "routes")


def parse_routes(file: str, text: str) -> Routes:
    """Reads routes of a text; the file's name is for messages, and to tell JSON from YAML.

    Raises:
        DocumentError: With the file, the line or key, what was found and what was expected.
    """
    document = read_document(file, text)
    if not isinstance(document.data, dict) or list(document.data) != ["routes"]:
        found = (
            ", ".join(document.data) if isinstance(document.data, dict) else _shown(document.data)
        )
        raise document.error((), f"found {found or 'nothing'}, expected one key, routes")
    routes = document.data["routes"]
    if not isinstance(routes, dict):
        raise document.error(
            ("routes",), f"found {_shown(routes)}, expected routes by name, or {{}} for none"
        )
    return Routes(document, _Parser(document, routes).targets())


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"


class _Parser:
    """Makes targets of the routes in a document."""

    def __init__(self, document: Document, routes: Mapping[str, Any]) -> None:
        self._check_keys, self._error = document.check_keys, document.error
        self._routes = routes

    def _wrong(self, keys: Keys, found: Any, expected: str) -> DocumentError:
        return self._error(keys, f"found {_shown(found)}, expected {expected}")

    def targets(self) -> dict[str, Target]:
        targets = {}
        for name, data in self._routes.items():
            if not name.strip():
                raise self._error(("routes",), "found an empty name, expected a route's name")
            targets[name] = self._target(data, ("routes", name))
        return targets

    def _target(self, data: Any, keys: Keys) -> Target:
        if not isinstance(data, dict):
            return Named(self._name(data, keys, _EXPECTED_TARGET))
        self._check_keys(keys, data, _TARGET_KEYS)
        kinds = [kind for kind in ("adapter", "blend", "split", "by") if kind in data]
        if len(kinds) != 1:
            found = " and ".join(kinds) or ", ".join(data) or "an empty mapping"
            raise self._error(keys, f"found {found}, expected {_EXPECTED_TARGET}")
        for key, kind in (("sticky", "split"), ("cases", "by"), ("default", "by")):
            if key in data and kind not in data:
                raise self._error((*keys, key), f"found {key} without {kind}; it goes with {kind}")
        target: Target
        if "adapter" in data:
            target = Named(self._name(data["adapter"], (*keys, "adapter"), "an adapter's name"))
        elif "blend" in data:
            target = self._blend(data["blend"], (*keys, "blend"))
        elif "split" in data:
            target = self._split(data, keys)
        else:
            target = self._cases(data, keys)
        if "fallback" not in data:
            return target
        return WithFallback(target, self._fallback(data["fallback"], (*keys, "fallback")))

    def _name(self, data: Any, keys: Keys, expected: str) -> str:
        if not isinstance(data, str) or not data.strip():
            hint = "" if data is None or isinstance(data, str | dict | list) else " in quotes"
            raise self._wrong(keys, data, f"{expected}{hint}")
        if data in self._routes:
            expected = "an adapter: a route cannot lead to a route"
            raise self._error(keys, f"found the route {data!r}, expected {expected}")
        return data

    def _blend(self, data: Any, keys: Keys) -> Blended:
        try:
            weights = weights_in(data)
        except BlendError as error:
            raise self._error(keys, str(error)) from None
        for name in weights:
            self._name(name, (*keys, name), "an adapter's name")
        return Blended(tuple(sorted(weights.items())))

    def _split(self, data: Mapping[str, Any], keys: Keys) -> Split:
        weights, place = data["split"], (*keys, "split")
        if not isinstance(weights, dict) or not weights:
            raise self._wrong(place, weights, "a weight for each adapter")
        for name, weight in weights.items():
            self._name(name, (*place, name), "an adapter's name")
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not 0 <= weight <= MAX_WEIGHT:
                expected = f"a weight: a number of 0 or more, at most {MAX_WEIGHT}"
                raise self._wrong((*place, name), weight, expected)
        if not any(weights.values()):
            raise self._error(place, "found weights of 0 only, expected one above 0")
        sticky = self._source(data.get("sticky", "user"), (*keys, "sticky"))
        return Split(".".join(keys[1:]), dict(weights), sticky)

    def _cases(self, data: Mapping[str, Any], keys: Keys) -> Cases:
        by = self._source(data["by"], (*keys, "by"))
        found, place = data.get("cases"), (*keys, "cases")
        if not isinstance(found, dict) or not found:
            raise self._wrong(place, found, "a target for each value")
        cases: dict[str, Target] = {}
        for value, target in found.items():
            if (folded := by.case(value)) in cases:
                raise self._error(
                    (*place, value), "found this value twice; upper and lower case are the same"
                )
            cases[folded] = self._target(target, (*place, value))
        default = None
        if "default" in data:
            default = self._target(data["default"], (*keys, "default"))
        return Cases(".".join(keys[1:]), by, cases, default)

    def _source(self, data: Any, keys: Keys) -> FactSource:
        try:
            return FactSource.parse(data if isinstance(data, str) else "")
        except ValueError as error:
            raise self._error(keys, f"found {_shown(data)}, {error}") from None

    def _fallback(self, data: Any, keys: Keys) -> tuple[str, ...]:
        names = data if isinstance(data, list) else [data]
        expected = "an adapter's name or a list of them"
        if not names:
            raise self._error(keys, f"found no name, expected {expected}")
        return tuple(self._name(name, keys, expected) for name in names)
