"""A plugin of vLLM's that notes which patches of vllm-multilora a process has called.

It acts where `MULTILORA_CALLED_PATCHES` names a folder: a patch's first call there makes an empty
file named after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "MULTILORA_CALLED_PATCHES"


def start() -> None:
    """Has every patch noted from now on; safe to call again."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    from vllm_multilora.integration.patching.patch import Patch

    load: Any = Patch.load_handler
    if load.__name__ == "load_and_note":
        return

    def load_and_note(self: Patch) -> Callable[..., Any]:
        (Path(folder) / self.name).touch()
        handler: Callable[..., Any] = load(self)
        return handler

    Patch.load_handler = load_and_note  # type: ignore[method-assign]
