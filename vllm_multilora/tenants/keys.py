"""Clients' keys: stored as hashes; looking up a right or a wrong one costs the same."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from typing import Generic, TypeVar

from vllm_multilora.config import MultiLoRAConfig

_T = TypeVar("_T")

ADMIN_KEY_VARIABLE = "MULTILORA_ADMIN_KEY"
"""The environment variable that may hold the operator's key."""

UNGUARDED = (
    f"--multilora-tenants, --multilora-admin-key-file and {ADMIN_KEY_VARIABLE} protect nothing "
    f"here, because vllm-multilora is not active: it needs --enable-lora without "
    f"--enable-tower-connector-lora, a vLLM that its gateway fits (see vllm-multilora doctor) and "
    f"vLLM's Python front end. Provide these, or leave all three out"
)
"""Why a server with keys does not start."""

MAX_KEY_LENGTH = 512
"""Longer keys are wrong, and not worth hashing."""

_PREFIX = "sha256:"
_STORED = re.compile(r"sha256:[0-9a-f]{64}")


def has_keys(settings: MultiLoRAConfig) -> bool:
    """Whether the settings name keys of operators or of tenants."""
    return settings.tenants is not None or settings.admin_key_file is not None


def key_in(environment: Mapping[str, str]) -> str:
    """The admin key that the environment has; empty: none."""
    return environment.get(ADMIN_KEY_VARIABLE, "").strip()


def can_be_sent(key: str) -> bool:
    """Whether a client can send a key, and a server finds it."""
    return key.isascii() and key.isprintable() and 0 < len(key) <= MAX_KEY_LENGTH


def new_key() -> str:
    """A key that nobody guesses: 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> bytes:
    """What is stored in a key's place; one SHA-256, so keys must be random, not chosen."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def stored(key: str) -> str:
    """A key as the tenants file has it."""
    return f"{_PREFIX}{digest_of(key).hex()}"


def is_stored(text: str) -> bool:
    """Whether a text is what is stored in a key's place."""
    return _STORED.fullmatch(text) is not None


def read_stored(text: str) -> bytes:
    """The digest of a key as the tenants file has it.

    Raises:
        ValueError: The text is none.
    """
    if not is_stored(text):
        raise ValueError("expected sha256: and 64 hexadecimal digits in lower case")
    return bytes.fromhex(text.removeprefix(_PREFIX))


class KeyRing(Generic[_T]):
    """Finds the owner of a key, of those by the digests of their keys.

    A look-up hashes the key once and looks once, however many keys there are. What is compared
    are hashes under a secret of this object's own: how long it takes tells nothing of the keys.
    """

    def __init__(self, owners: Mapping[bytes, _T]) -> None:
        self._secret = os.urandom(32)
        self._owners = {self._blinded(digest): who for digest, who in owners.items()}

    def owner(self, key: str) -> _T | None:
        """The owner of a key; None if nobody has it."""
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            return None
        return self._owners.get(self._blinded(digest_of(key)))

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()
