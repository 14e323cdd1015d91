"""What the settings say about sources: which are allowed, and where what is fetched is kept."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.sources.source_errors import SourceError
from vllm_multilora.sources.source_url import OBJECT_STORES, allowed_source, allowed_sources


def require_sources(settings: MultiLoRAConfig) -> list[str]:
    """Checks, at start-up, the URLs in the settings; returns the allowed roots that are folders.

    Raises:
        ConfigError: One cannot be used.
    """
    flag = "--multilora-allowed-roots"
    try:
        sources = allowed_sources(settings.allowed_roots)
        flag = "--multilora-adapter-dir"
        for url in allowed_sources(settings.adapter_dir):
            allowed_source(url, sources)
    except SourceError as error:
        raise ConfigError(f"{flag}: {error}") from None
    if sources and settings.store == "thread":
        raise ConfigError(
            f"--multilora-allowed-roots names {sources[0]}, and --multilora-store thread starts no "
            "process that could fetch from there: leave the latter out, or name folders only"
        )
    for source in sources:
        if source.scheme in OBJECT_STORES and find_spec("obstore") is None:
            raise ConfigError(
                f"--multilora-allowed-roots names {source}, and obstore, which reads from "
                f"{OBJECT_STORES[source.scheme]}, is not installed: pip install "
                "vllm-multilora[remote]"
            )
    return [root for root in settings.allowed_roots if not is_url(root)]


def disk_cache(settings: MultiLoRAConfig) -> str | None:
    """The folder for what is fetched, by its absolute path; None where nothing is allowed to be."""
    if not any(map(is_url, settings.allowed_roots)):
        return None
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm-multilora", "adapters")
    return str(Path(settings.disk_cache or own).expanduser().absolute())


def roots_of_store(settings: MultiLoRAConfig) -> tuple[str, ...]:
    """The allowed roots as another process understands them, with what is fetched among them."""
    cache = disk_cache(settings)
    roots = (
        root if is_url(root) else os.path.abspath(root)  # noqa: PTH100 (takes `..` out)
        for root in settings.allowed_roots
    )
    return (*roots, *([cache] if cache else ()))
