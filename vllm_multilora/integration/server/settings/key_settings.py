"""Keys in the settings of a server, checked before the server starts.

Who has which key at run time is the gateway's affair; see `vllm_multilora.gateway.keys`.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakSet

from vllm import envs

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.documents import DocumentError, read_file
from vllm_multilora.tenants.keys import (
    ADMIN_KEY_VARIABLE,
    MAX_KEY_LENGTH,
    can_be_sent,
    is_stored,
    key_in,
)
from vllm_multilora.tenants.rules import Locks

logger = logging.getLogger(__name__)

COUNT_VARIABLE = "MULTILORA_API_SERVERS"
"""Tells the API servers of one `vllm serve` how many they are."""

MIN_ADMIN_KEY = 16


class Stoppable(Protocol):
    """Something whose waiting requests are refused when the server stops."""

    def stop(self) -> None:
        """Refuses whatever waits."""


STOPPED_WITH_SERVER: WeakSet[Stoppable] = WeakSet()
"""What `stop_waiting` stops in this process."""


def stop_waiting() -> None:
    """Refuses requests that wait for their turn: the engine stops, and the server waits for all."""
    for each in STOPPED_WITH_SERVER:
        each.stop()


def read_admin_keys(settings: MultiLoRAConfig, environment: Mapping[str, str]) -> list[str]:
    """The operators' keys: those in their file, or the variable's value.

    Raises:
        ConfigError: The file cannot be read or holds no key, or one is short, a hash or cannot be
            sent.
    """
    if settings.admin_key_file is not None:
        return read_file(settings.admin_key_file, parse_admin_keys, "admin keys")
    found = key_in(environment)
    return parse_admin_keys(ADMIN_KEY_VARIABLE, found) if found else []


def parse_admin_keys(where: str, text: str) -> list[str]:
    """Operators' keys: every line that is not empty.

    Args:
        where: The file's name, for messages, which never show a key.
        text: What it holds.

    Raises:
        DocumentError: There is no key, or one is short, a hash or cannot be sent.
    """
    lines = map(str.strip, text.removeprefix("\ufeff").splitlines())
    if not (found := [line for line in lines if line]):
        raise DocumentError(f"{where}: found no admin key, expected one per line")
    if any(len(key) < MIN_ADMIN_KEY for key in found):
        raise DocumentError(
            f"{where}: found an admin key of fewer than {MIN_ADMIN_KEY} characters, expected a "
            f"random one (vllm-multilora tenants new makes one)"
        )
    if any(map(is_stored, found)):
        raise DocumentError(
            f"{where}: found a key's hash, expected keys alone, as in the first line of what "
            f"vllm-multilora tenants new prints"
        )
    if not all(map(can_be_sent, found)):
        raise DocumentError(
            f"{where}: found an admin key that HTTP cannot carry, expected up to {MAX_KEY_LENGTH} "
            f"printable ASCII characters"
        )
    return found


def api_keys_in(args: Namespace) -> list[str]:
    """The API keys of vLLM itself, in a server's arguments or environment."""
    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]


def warn_of_open_updates(locks: Locks) -> None:
    """Logs who can load and unload adapters where there is no admin key."""
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and not locks.admin_key:
        who = "Everybody with the API key" if locks.api_key else "Everybody"
        if locks.tenants and not locks.api_key:
            who = "Nobody"
        logger.warning(
            "%s can load and unload adapters: there is no admin key "
            "(--multilora-admin-key-file or MULTILORA_ADMIN_KEY).",
            who,
        )
