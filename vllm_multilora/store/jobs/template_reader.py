"""Reads the chat template of one adapter, without rights: a program of its own.

Its argument and what it prints are JSON: where the adapter is, and its template or what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from vllm_multilora.adapters.files.adapter_folder import AdapterFolder
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.store.jobs import sandbox

CPU_S = 5.0
"""Seconds of processor time; most files take milliseconds."""

_WAIT_S = 30.0

MAX_BYTES = {"chat_template.jinja": 256 << 10, "tokenizer_config.json": 8 << 20}
"""Bytes of the files that are read: several times those of known models."""


def read(path: str, roots: AllowedRoots) -> dict[str, Any]:
    """An adapter's template, None where it has none, and the tokens that its tokenizer adds."""
    texts = dict.fromkeys(MAX_BYTES, "")
    with AdapterFolder(path, roots) as folder:
        for name in filter(folder.has, MAX_BYTES):
            with folder.open(name) as file:
                content = file.read(MAX_BYTES[name] + 1)
            if len(content) > MAX_BYTES[name]:
                raise ValueError(f"{name} is too long, expected {MAX_BYTES[name]} bytes at most")
            texts[name] = content.decode()
    template, config = map(texts.get, MAX_BYTES)
    settings = json.loads(config or "{}")
    template = template or settings.get("chat_template") or None
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    added = settings.get("added_tokens_decoder") or {}
    return {"template": template, "tokens": [str(each["content"]) for each in added.values()]}


def read_apart(
    path: str, roots: Sequence[str], directories: Sequence[str], environment: dict[str, str]
) -> dict[str, Any]:
    """What `read` gives, by a process without rights, or an `error`."""
    argument = json.dumps([path, roots, directories])
    command = [sys.executable, "-P", "-m", __name__, argument]
    pipe = subprocess.DEVNULL
    try:
        said = subprocess.check_output(command, timeout=_WAIT_S, env=environment, stdin=pipe)
        found: dict[str, Any] = json.loads(said)
    except (subprocess.SubprocessError, ValueError):
        return {"error": "it takes too much time or memory to read"}
    return found


def main() -> None:
    """Gives up this process's rights, and prints what it reads then."""
    path, roots, directories = json.loads(sys.argv[1])
    allowed = AllowedRoots(roots, directories)
    sandbox.enter(allowed.roots_for(path), CPU_S)
    try:
        print(json.dumps(read(path, allowed)))
    except Exception as error:  # the files are a customer's
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}))


if __name__ == "__main__":
    main()
