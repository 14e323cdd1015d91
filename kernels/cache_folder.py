"""Where what is made once on a machine is kept for later processes, if the user names no folder."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path | None:
    """The user's own cache folder; None for a user without a home folder."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "vllm-multilora"
    try:
        return Path.home() / ".cache" / "vllm-multilora"
    except RuntimeError:  # neither HOME nor an entry in the user database
        return None
