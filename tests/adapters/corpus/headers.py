"""Rewrites the header of a safetensors file."""

import json
import os
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
        text = found if isinstance(found, bytes) else json.dumps(found or header).encode()
        (folder / WEIGHTS).write_bytes(join(text, data))

    draft.afterwards.append(step)


def append_hole(folder: Path, name: str, size: int) -> None:
    """Appends a tensor of so many bytes, for which the file has a hole."""
    header, data = split((folder / WEIGHTS).read_bytes())
    header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    content = join(json.dumps(header).encode(), data)
    (folder / WEIGHTS).write_bytes(content)
    os.truncate(folder / WEIGHTS, len(content) + size)
