"""Has the engine read adapters when the server starts, before anybody asks for them.

An adapter of a directory is read on its first use, and so is what a resolver finds. Those that
`--multilora-preload` names are read one after the other, behind requests' own loads, while the
server answers already. `GET /v1/lora_adapters/NAME` says when one is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration, resolvers
from vllm_multilora.integration.server.names.public_names import public_names

logger = logging.getLogger(__name__)

ALL = "all"
"""Stands for all adapters that the server has names for when it starts."""


def start(models: Any) -> None:
    """Begins to have the adapters read that the settings name; others are not touched.

    Raises:
        ConfigError: The file of names cannot be read.
    """
    if not registration.acts_for(models):
        return
    given = settings_of(models.engine_client.vllm_config).preload
    if given is not None:
        names = [*public_names(models)] if given == ALL else names_in(given)
        registration.in_background(_read(models, names))


def names_in(given: str) -> list[str]:
    """The names in the setting: separated by commas, or one a line in the file behind an `@`.

    Raises:
        ConfigError: The file cannot be read.
    """
    if not given.startswith("@"):
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        lines = Path(given[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--multilora-preload: the file {given[1:]!r} cannot be read: {error}; expected the "
            "name of an adapter on each line"
        ) from error
    return [name for line in lines if (name := line.strip())]


async def _read(models: Any, names: Iterable[str]) -> None:
    """Has adapters read in turn; the log says which ones cannot be served, and why."""
    count = 0
    for name in names:
        try:
            refusal = await resolvers.find(models, name)
        except Exception as error:
            logger.warning("Adapter %s was not read ahead: %s", name, error)
            continue
        if refusal is not None:
            logger.warning("Adapter %s was not read ahead: %s", name, refusal.error.message)
        elif name not in public_names(models):
            logger.warning("Adapter %s was not read ahead: there is none of this name.", name)
        else:
            count += 1
    logger.info("Adapters read ahead: %d.", count)
