"""Reads a YAML or JSON file as plain data that remembers each value's line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vllm_multilora.errors import ConfigError
from vllm_multilora.wording import guess

Keys = tuple[str, ...]
"""The keys from the top of a document down to a value."""

_TOO_DEEP = "found lists or mappings that are nested too deeply"


class DocumentError(ConfigError):
    """A file of settings cannot be used; says where, what was found and what was expected."""


@dataclass(frozen=True)
class Document:
    """A file's data.

    Attributes:
        file: The file's name, for messages.
        data: Mappings with text keys, lists and scalars.
        lines: The line of the values and keys, where the format tells (YAML).
    """

    file: str
    data: Any
    lines: Mapping[Keys, int]

    def error(self, keys: Keys, message: str) -> DocumentError:
        """An error about the value at some keys."""
        around = [keys[:depth] for depth in range(len(keys), -1, -1)]
        line = next((self.lines[place] for place in around if place in self.lines), None)
        return _error(self.file, line, ".".join(keys), message)

    def check_keys(self, keys: Keys, found: Iterable[str], known: Collection[str]) -> None:
        """Checks that a mapping has no keys but known ones.

        Args:
            keys: Where it is.
            found: Its keys.
            known: Those that it may have.

        Raises:
            DocumentError: It has another one.
        """
        for key in found:
            if key not in known:
                expected = f"{', '.join(known)}{guess(key, known)}"
                raise self.error((*keys, key), f"found an unknown key, expected {expected}")


def read_document(file: str, text: str) -> Document:
    """Reads a file's text: as JSON if its name ends in `.json`, otherwise as YAML.

    Raises:
        DocumentError: The text is not of the format, has a key twice or one that is no text, or
            has a whole number that 64 bits do not hold.
    """
    if PurePath(file).suffix.lower() == ".json":
        return Document(file, read_json(file, text), {})
    lines: dict[Keys, int] = {}
    return Document(file, _YamlReader(file, lines).read(text), lines)


def _error(file: str, line: int | None, place: str, message: str) -> DocumentError:
    where = ", ".join(part for part in (file, f"line {line}" if line else "", place) if part)
    return DocumentError(f"{where}: {message}")


def _checked(number: int) -> int:
    """The number, if floats and every message can have it.

    Raises:
        ValueError: 64 bits do not hold it.
    """
    if not -(2**63) <= number < 2**63:
        raise ValueError
    return number


def read_json(file: str, text: str) -> Any:
    """The data of a JSON text.

    Raises:
        DocumentError: As for `read_document`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _error(file, None, "", f"found the key {key!r} twice in one object")
            found[key] = value
        return found

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_int=lambda digits: _checked(int(digits))
        )
    except DocumentError:
        raise
    except json.JSONDecodeError as error:
        raise _error(file, error.lineno, "", f"found invalid JSON: {error.msg}") from None
    except RecursionError:
        raise _error(file, None, "", _TOO_DEEP) from None
    except ValueError:
        raise _error(file, None, "", "found a whole number of more than 64 bits") from None


class _YamlReader:
    """Builds the data from PyYAML's nodes, which know their lines and show keys that occur twice.

    Args:
        file: The file's name, for messages.
        lines: Gets the line of everything.
    """

    def __init__(self, file: str, lines: dict[Keys, int]) -> None:
        # vLLM brings PyYAML; this package alone does not ask for it.
        try:
            import yaml
        except ImportError:
            raise DocumentError(
                f"{file}: reading YAML needs PyYAML: pip install pyyaml, or write a .json file"
            ) from None
        self._yaml = yaml
        self._file = file
        self._lines = lines
        self._open: list[Any] = []  # the nodes around the one that is being read

    def read(self, text: str) -> Any:
        try:
            self._loader = self._loader_class()(text)
            node = self._loader.get_single_node()
            if node is None:
                return None
            self._check_keys(node, (), [])
            return self._value(node, ())
        except self._yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else None
            problem = " ".join(filter(None, (error.context, error.problem)))
            raise _error(self._file, line, "", f"found invalid YAML: {problem}") from None
        except self._yaml.YAMLError as error:
            raise _error(self._file, None, "", f"found invalid YAML: {error}") from None
        except RecursionError:
            raise _error(self._file, None, "", _TOO_DEEP) from None

    def _loader_class(self) -> Any:
        """PyYAML's safe loader with all types as PyYAML reads them.

        Libraries change the one that all share: lm-format-enforcer, which vLLM imports for some
        structured outputs, has it read every date as text from then on.
        """
        yaml = self._yaml
        # The C parser is ten times as fast; not every build of PyYAML has it.
        base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        kept = {
            f"tag:yaml.org,2002:{kind}": getattr(base, f"construct_yaml_{kind}")
            for kind in ("null", "bool", "int", "float", "binary", "timestamp", "str")
        }
        constructors = {**base.yaml_constructors, **kept}
        return type("Loader", (base,), {"yaml_constructors": constructors})

    def _check_keys(self, node: Any, keys: Keys, seen: list[Any]) -> None:
        """Sees to it that keys are text and occur once, before mappings are merged."""
        if isinstance(node, self._yaml.ScalarNode) or any(node is other for other in seen):
            return
        seen.append(node)
        if isinstance(node, self._yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._check_keys(item, (*keys, str(number)), seen)
            return
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self._constructed(key_node, keys)
            if not isinstance(key, str):
                written = key_node.value if isinstance(key_node, self._yaml.ScalarNode) else key
                raise _error(
                    self._file,
                    line,
                    ".".join(keys),
                    f"found the key {written}, which YAML reads as {key!r}, expected text: "
                    f'write "{written}"',
                )
            if key in lines:
                raise _error(
                    self._file,
                    line,
                    ".".join((*keys, key)),
                    f"found this key twice, first in line {lines[key]}",
                )
            lines[key] = line
            self._check_keys(value_node, (*keys, key), seen)

    def _constructed(self, node: Any, keys: Keys) -> Any:
        """What a scalar or a key is, by its tag or by what it looks like."""
        kind = node.tag.rpartition(":")[2]
        try:
            value = self._loader.construct_object(node, True)
            return _checked(value) if isinstance(value, int) else value
        except (self._yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML lets through what types raise: KeyError for `!!bool x`
            # The value is not shown: it may be a secret.
            valid = "one of up to 64 bits" if kind == "int" else "one"
            raise _error(
                self._file,
                node.start_mark.line + 1,
                ".".join(keys),
                f"found a value that YAML reads as {kind}, but it is not a valid {valid}; write "
                f"text in quotes",
            ) from None

    def _value(self, node: Any, keys: Keys) -> Any:
        self._lines.setdefault(keys, node.start_mark.line + 1)
        if isinstance(node, self._yaml.ScalarNode):
            return self._constructed(node, keys)
        if any(node is outer for outer in self._open):
            line = self._lines[keys]
            raise _error(
                self._file, line, ".".join(keys), "found an alias of an object that contains it"
            )
        self._open.append(node)
        try:
            if isinstance(node, self._yaml.SequenceNode):
                return [
                    self._value(item, (*keys, str(number)))
                    for number, item in enumerate(node.value)
                ]
            return self._mapping(node, keys)
        finally:
            self._open.pop()

    def _mapping(self, node: Any, keys: Keys) -> dict[str, Any]:
        # `<<: *anchor` puts the other mapping's pairs before the mapping's own, which win.
        self._loader.flatten_mapping(node)
        pairs = {self._constructed(key, keys): (key, value) for key, value in node.value}
        for name, (key_node, _) in pairs.items():
            self._lines[(*keys, name)] = key_node.start_mark.line + 1
        return {name: self._value(value, (*keys, name)) for name, (_, value) in pairs.items()}
