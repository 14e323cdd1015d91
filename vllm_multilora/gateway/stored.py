"""Ids of stored responses: a tenant's own can be told from all others by whoever has the secret.

vLLM keeps responses by id, for whoever has the id, and lets clients choose ids. The gateway chooses
those of tenants, and lets no tenant name one that was not chosen for it.
"""

from __future__ import annotations

import hmac
import re
import secrets
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import MultiLoRAError

if TYPE_CHECKING:
    from vllm_multilora.integration.server.requests.callers import Caller

ID_FIELD = "request_id"
"""The field of a `/v1/responses` body that becomes the response's id."""

PREVIOUS_FIELD = "previous_response_id"
_NONCE = 16  # hexadecimal digits
_PREFIX = "resp_"
_ID_IN_PATH = re.compile(r"/v1/responses/([^/]+)")


class UnknownResponseError(MultiLoRAError):
    """A response that does not exist, or is not the tenant's."""

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id {response_id[:128]!a} not found.")


def new_id(caller: Caller) -> str:
    """An id for a tenant's response, which nobody else can make."""
    return _id_of(caller, secrets.token_hex(_NONCE // 2))


def require_own(caller: Caller, response_id: Any) -> None:
    """Looks at the id of a response that a tenant asks for.

    Raises:
        UnknownResponseError: It was not chosen for this tenant.
    """
    if not isinstance(response_id, str):
        return  # vLLM says what is wrong with it
    own = _id_of(caller, response_id[len(_PREFIX) :][:_NONCE])
    if not hmac.compare_digest(_encoded(own), _encoded(response_id)):
        raise UnknownResponseError(response_id)


def require_own_path(caller: Caller, path: str) -> None:
    """As `require_own`, for the path of a stored response."""
    if (found := _ID_IN_PATH.match(path)) is not None:
        require_own(caller, found[1])


def _id_of(caller: Caller, nonce: str) -> str:
    return f"{_PREFIX}{nonce}{caller.own_id(f'response {nonce}')}"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
