"""Seals: they say, where no client can write it, whose a request is.

The gateway makes one for each call on a server with tenants. It travels to the engine core in the
request's `cache_salt`, or in its id, and is opened there; see `engine.requests.tenant_wall`. It
holds the tenant, what the engine has to know of it, and the salt of the request's cached prefixes.
It ends with a code that takes the server's secret to make.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from functools import lru_cache
from typing import NamedTuple

SECRET_VARIABLE = "MULTILORA_CACHE_SALT"
"""Holds the secret: API servers and engines of one `vllm serve` inherit it."""

MAX_SEAL_CHARACTERS = 128
"""What vLLM accepts as a `cache_salt`."""

SALT_CHARACTERS = 20
_CODE_CHARACTERS = 16  # 96 bits
_MAX_RESIDENT = 99_999_999  # eight digits: seals are short


class Seal(NamedTuple):
    """What a seal says.

    Attributes:
        tenant: The tenant's name; empty for an operator or a client with the API key.
        weight: The tenant's weight, to six digits.
        resident: The tenant's limit of adapters in host memory; None for no limit.
        salt: What the request's cached prefixes are kept apart by; empty for nothing.
    """

    tenant: str = ""
    weight: float = 1.0
    resident: int | None = None
    salt: str = ""


@lru_cache(4_096)
def sealed(secret: str, seal: Seal) -> str:
    """The text of a seal: letters, digits and `.:_+-`, at most `MAX_SEAL_CHARACTERS`.

    Args:
        secret: Of this start of the server; its engine has the same.
        seal: What is said. The tenant's name has no colon and at most 64 characters.
    """
    resident = "" if seal.resident is None else min(seal.resident, _MAX_RESIDENT)
    said = f"{seal.tenant}:{seal.weight:.6g}:{resident}:{seal.salt}"
    return f"{said}:{_code(secret, said)}"


def opened(secret: str, text: str | None) -> Seal | None:
    """What a seal says; None where the text is no seal of this server."""
    if text is None or len(text) > MAX_SEAL_CHARACTERS or not text.isascii():
        return None
    said, _, code = text.rpartition(":")
    if not hmac.compare_digest(code, _code(secret, said)):
        return None
    tenant, weight, resident, salt = said.split(":")
    return Seal(tenant, float(weight), int(resident) if resident else None, salt)


def _code(secret: str, said: str) -> str:
    code = base64.urlsafe_b64encode(
        hmac.digest(secret.encode(), f"seal\n{said}".encode(), hashlib.sha256)
    )
    return code[:_CODE_CHARACTERS].decode()
