"""Who sent the HTTP request that is being handled, and what they may be told.

vLLM looks up model names, lists models and hands requests to the engine far below HTTP. Code that
depends on who asks finds out here. If no keys are set there is no caller, and everything works as
without this module.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.exceptions import GracefulHTTPError

from vllm_multilora.integration.failed_requests import without_folders
from vllm_multilora.integration.seals import SALT_CHARACTERS, Seal, sealed
from vllm_multilora.tenants.limits import LimitReachedError
from vllm_multilora.tenants.rules import Role

if TYPE_CHECKING:
    from vllm_multilora.tenants.limits import Account
    from vllm_multilora.tenants.tenant import Tenant

MAX_ANSWERS = 2_048
"""Answers in flight per call of a tenant. Starting one costs the event loop about 0.1 ms."""

MAX_SCORES = 65_536
"""Log probabilities that a tenant's call may want to be told in one piece; each takes the event
loop up to fifteen microseconds."""

MAX_RESULTS = 64 << 20
"""Numbers that the engine may send for a tenant's pooling call: of embeddings of tokens, say."""

MAX_RESULTS_AS = {"float": 1 << 20, "base64": 16 << 20, "bytes": 16 << 20, "bytes_only": 16 << 20}
"""Fewer, where a call has them told: as JSON each takes nearly a microsecond, in which no thread of
the API server does anything else, and a hundred bytes of memory; as bytes a tenth of that."""


@lru_cache(4_096)
def tenant_salt(secret: str, tenant: str, own: str | None) -> str:
    """The salt of a request: nobody who does not know the secret can have the same.

    Args:
        secret: The server's, or that of all replicas that may share cached prefixes.
        tenant: The tenant's name, which has no line break; empty for no tenant.
        own: What the client asked for; it divides the tenant's cache further.
    """
    said = f"{tenant}\n{'' if own is None else f'+{own}'}".encode("utf-8", "surrogatepass")
    return hmac.digest(secret.encode(), said, "sha256").hex()


@dataclass
class Caller:
    """One HTTP request's sender.

    Attributes:
        folders: What answers must not name; nothing for whoever may see folders.
        hides_folders: Whether answers must not name folders, those of adapters included.
        account: The tenant's; None for everybody else.
        secret: What a tenant's salts and ids are made with.
        granted: What the engine may answer this request with: adapters by name, None for the
            base model.
        retry_after_s: When a request over the tenant's limits may come again.
        has_turn: Whether it is one of the tenant's running calls.
        body_bytes: Bytes of its body, where that has texts.
        most_results: Numbers that the answer to a tenant's pooling call may hold.
        seal_secret: What seals are made with, which the engine reads.
    """

    role: Role
    folders: Sequence[str] = ()
    hides_folders: bool = False
    account: Account | None = None
    secret: str = ""
    granted: set[str | None] = field(default_factory=set)
    retry_after_s: int | None = None
    has_turn: bool = False
    body_bytes: int = 0
    most_results: int = MAX_RESULTS
    seal_secret: str = ""
    _text: int = 0
    _answers: int = 0
    _scores: int = 0
    _results: int = 0
    _used: set[str] = field(default_factory=set)

    @property
    def tenant(self) -> Tenant | None:
        """The tenant, as the tenants file has it now; None for everybody else."""
        return None if self.account is None else self.account.tenant

    def may_use(self, name: str | None, *, is_base: bool, is_route: bool) -> bool:
        """Whether a request may name a model, or none, whether there is such a model or not."""
        tenant = self.tenant
        if tenant is None:
            return True
        if is_base or not name:
            return tenant.base_model
        return name in (tenant.routes if is_route else tenant.adapters)

    def grant(self, name: str | None) -> ErrorResponse | None:
        """Lets this request use an adapter, or the base model by None.

        Returns:
            The answer where the tenant has too many adapters in use.
        """
        if self.account is not None and name is not None and name not in self._used:
            try:
                self.account.use(name)
            except LimitReachedError as error:
                self.retry_after_s = error.retry_after_s
                return error_response(HTTPStatus.TOO_MANY_REQUESTS, str(error), "model")
            self._used.add(name)
        self.granted.add(name)
        return None

    async def begin_text(self) -> None:
        """Waits until vLLM may make tokens of the call's texts, until `end_text`."""
        if self.account is not None:
            await self.account.begin_text(self.body_bytes)
            self._text = self.body_bytes

    def end_text(self) -> None:
        """The call's texts are tokens, or never will be; saying it again is no matter."""
        if self.account is not None:
            text, self._text = self._text, 0
            self.account.end_text(text)

    def count_answers(self, count: int) -> None:
        """The call wants so many answers more, until `answered`.

        Raises:
            GracefulHTTPError: A tenant's wants too many: nobody is answered while they are begun;
                or it and the tenant's others do.
        """
        if self.account is None:
            return
        requested, limit = self._answers + count, self.account.most_answers
        most = MAX_ANSWERS if limit is None else min(limit, MAX_ANSWERS)
        self._bound(requested, most, "answers at a time, those to all of its prompts together.")
        try:
            self.account.reserve_answers(count)
        except LimitReachedError as error:
            self.retry_after_s = error.retry_after_s
            raise GracefulHTTPError(str(error), HTTPStatus.TOO_MANY_REQUESTS) from error
        self._answers = requested

    def answered(self, count: int = 1) -> None:
        """So many of them have ended: others may have their places before the call ends."""
        if self.account is not None:
            ended = min(count, self._answers)  # none are left where the call has ended before
            self._answers -= ended
            self.account.release_answers(ended)

    def count_scores(self, count: int) -> None:
        """The call is told so many log probabilities in one piece, more than before.

        Raises:
            GracefulHTTPError: A tenant's wants too many: nobody is answered while they are told.
        """
        self._scores += count
        what = "log probabilities at a time at most, of answers that are not streamed."
        self._bound(self._scores, MAX_SCORES, what)

    def count_results(self, count: int) -> None:
        """The engine has sent so many numbers more for a pooling call.

        Raises:
            GracefulHTTPError: There are too many in a tenant's: nobody is answered while they are
                told.
        """
        self._results += count
        hint = "send fewer prompts at a time, or ask for `encoding_format` base64."
        self._bound(self._results, self.most_results, f"numbers in its answer at most: {hint}")

    def _bound(self, requested: int, most: int, what: str) -> None:
        if self.account is not None and requested > most:
            raise GracefulHTTPError(f"One call may want {most} {what}", HTTPStatus.BAD_REQUEST)

    def seal(self, own: str | None) -> str:
        """What tells the engine whose the call is, with the salt that the client has chosen."""
        tenant = self.tenant
        name = "" if tenant is None else tenant.name
        salt = tenant_salt(self.secret, name, own)[:SALT_CHARACTERS] if name or own else ""
        if tenant is None:
            return sealed(self.seal_secret, Seal(salt=salt))
        return sealed(self.seal_secret, Seal(name, tenant.weight, tenant.limits.resident, salt))

    def ended(self) -> None:
        """Gives back what the request uses, once it has been answered."""
        if self.account is None:
            return
        for name in self._used:
            self.account.release(name)
        self._used.clear()
        self.end_text()
        self.answered(self._answers)
        if self.has_turn:
            self.account.end()

    def shown(self, text: str, folder: str | None = None) -> str:
        """A text without the folders that the caller must not see, that of an adapter included."""
        if not self.hides_folders:
            return text
        return without_folders(text, (*self.folders, *([folder] if folder else [])))


_TYPES = {
    HTTPStatus.BAD_REQUEST: ("BadRequestError", "invalid_request_error"),
    HTTPStatus.UNAUTHORIZED: ("AuthenticationError", "authentication_error"),
    HTTPStatus.FORBIDDEN: ("PermissionDeniedError", "permission_error"),
    HTTPStatus.NOT_FOUND: ("NotFoundError", "not_found_error"),
    HTTPStatus.CONFLICT: ("ConflictError", "invalid_request_error"),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("BadRequestError", "request_too_large"),
    HTTPStatus.TOO_MANY_REQUESTS: ("RateLimitError", "rate_limit_error"),
    HTTPStatus.INTERNAL_SERVER_ERROR: ("InternalServerError", "api_error"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("ServiceUnavailableError", "overloaded_error"),
}
TYPES, ANTHROPIC_TYPES = ({key: kinds[api] for key, kinds in _TYPES.items()} for api in (0, 1))
"""What vLLM, or where it has no such answer OpenAI's client, calls an error, by its status; and
what Anthropic does."""


def error_response(status: HTTPStatus, message: str, param: str | None = None) -> ErrorResponse:
    """An error in vLLM's shape, which is OpenAI's."""
    error = ErrorInfo(message=message, type=TYPES[status], param=param, code=status.value)
    return ErrorResponse(error=error)


current_caller: ContextVar[Caller | None] = ContextVar("multilora_caller", default=None)
"""Who sent the request that is being worked for; None outside of any, and where no keys are set."""


def turn_to_read() -> AbstractAsyncContextManager[Any]:
    """Holds back requests of a tenant that has several adapters looked for, or read first.

    To be had before any lock: nobody waits for a name behind all that a tenant has asked for.
    """
    caller = current_caller.get()
    account = None if caller is None else caller.account
    return nullcontext() if account is None else account.first_readings
