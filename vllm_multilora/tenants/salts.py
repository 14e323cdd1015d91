"""Salts that keep tenants' cached prefixes apart."""

from __future__ import annotations

import hashlib
import hmac


def tenant_salt(secret: str, tenant: str, own: str | None) -> str:
    """The salt of a request: nobody who does not know the secret can have the same.

    Args:
        secret: The server's, or that of all replicas that may share cached prefixes.
        tenant: The tenant's name, which has no line break; empty for no tenant.
        own: What the client asked for; it divides the tenant's cache further.
    """
    said = f"{tenant}\n{'' if own is None else f'+{own}'}"
    return hmac.new(
        secret.encode(), said.encode("utf-8", "surrogatepass"), hashlib.sha256
    ).hexdigest()
