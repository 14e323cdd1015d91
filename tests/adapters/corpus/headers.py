"""Rewrites the header of a safetensors file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .draft import WEIGHTS, Draft


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header, and the bytes after it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: bytes, data: bytes) -> bytes:
    """A file of a header and the bytes after it."""
    return len(header).to_bytes(8, "little") + header + data


def rewrite(draft: Draft, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header once the file is there, in place or to what `change` returns."""

    def step(folder: Path) -> None:
        header, data = split((folder / WEIGHTS).read_bytes())
        found = change(header)
        text = json.dumps(header if found is None else found).encode()
        (folder / WEIGHTS).write_bytes(join(text, data))

    draft.afterwards.append(step)


def set_entry(draft: Draft, name: str, **keys: object) -> None:
    """Changes keys of one tensor's entry."""
    rewrite(draft, lambda header: header[name].update(keys))
