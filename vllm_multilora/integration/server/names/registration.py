"""The API server's part: vLLM's routes for loading and unloading adapters, with exact answers.

An adapter that is loaded again under its name gets a new number. Requests in flight end on the
old weights, new ones begin on the new, the old version is unloaded once nobody uses it, and a
reload that fails leaves it serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
from pydantic import Field
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.problems import Code, Problem, shown_name
from vllm_multilora.adapters.served_names import name_fault, path_fault
from vllm_multilora.failures import unexpected
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.equal_loads import was_loaded
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.integration.failed_requests import STATUS, AdapterRefusedError, without_folder
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import shared_names
from vllm_multilora.integration.server.names.public_names import is_reserved, public_names
from vllm_multilora.integration.server.requests import metering
from vllm_multilora.integration.server.requests.callers import TYPES, current_caller
from vllm_multilora.integration.server.requests.engine_admission import SEE_OFF
from vllm_multilora.integration.server.requests.engine_calls import answer_of, register
from vllm_multilora.integration.server.requests.http_calls import GRACE_S, current_call
from vllm_multilora.integration.server.requests.own_templates import OWN_TEMPLATES
from vllm_multilora.integration.server.settings.gateway_activation import manages_adapters

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ROUTE_NAMES: Attached[Container[str]] = Attached("route-names")
"""The names of the routes of vLLM's `OpenAIServingModels`, which no adapter may have."""

_LOCKS: Attached[LocksInUse] = Attached("locks")

MAX_ADAPTERS = 65_536
"""Adapters that an API server serves at a time: as many as an engine can know."""

LATE_GRACE_S = 3 * GRACE_S
"""How long an adapter stays that a request has brought back after that. By then other API servers,
which look at adapter directories for themselves, know too that its version is an old one."""


class LocksInUse(WeakValueDictionary[str, asyncio.Lock]):
    """Locks by name, for names that anybody may invent, as many and as long as they like."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        """The lock of a name, which lives for as long as somebody holds or awaits it."""
        return self.setdefault(name, asyncio.Lock())


class AdapterErrorInfo(ErrorInfo):
    """vLLM's error with all problems of an adapter."""

    problems: list[Problem] = Field(default_factory=list)


class AdapterErrorResponse(ErrorResponse):
    """vLLM's error response with all problems of an adapter."""

    error: AdapterErrorInfo


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": AdapterErrorResponse, "description": description}
    for status, description in (
        (400, "The name, the path or the adapter itself is wrong."),
        (401, "The request has no valid key."),
        (403, "The path is outside the allowed folders, or the key too weak."),
        (404, "There is no such adapter."),
        (409, "Another version is served than was expected."),
        (500, "The server has failed."),
        (503, "The storage failed, or memory or time ran out."),
    )
}
"""Answers other than 200 of vLLM's routes for adapters, as `/openapi.json` describes them."""

STATUS_REFUSALS: dict[int | str, Any] = {s: {"model": ErrorResponse} for s in (401, 404, 503)}


def lock_of(models: Any, name: str) -> asyncio.Lock:
    """The lock of a name, which whoever changes what it stands for has to hold."""
    return _LOCKS.get_or_make(models, LocksInUse)[name]


def acts_for(models: Any) -> bool:
    """Whether the plugin loads the adapters of the engine behind a server, and not vLLM itself."""
    vllm_config = getattr(getattr(models, "engine_client", None), "vllm_config", None)
    return vllm_config is not None and manages_adapters(vllm_config)


async def load(models: Any, request: Any) -> ErrorResponse | str:
    """Loads an adapter, and goes on if the caller gives up: nobody else frees what engines hold.

    vLLM does it where the plugin does not manage the adapters.
    """
    if (refusal := name_refusal(models, request.lora_name)) is not None:
        return refusal
    if acts_for(models):
        return await asyncio.shield(in_background(load_adapter(models, request)))
    answer: ErrorResponse | str = await models.load_lora_adapter(request)
    return answer


async def unload(models: Any, request: Any) -> ErrorResponse | str:
    if acts_for(models):
        return await asyncio.shield(in_background(unload_adapter(models, request)))
    answer: ErrorResponse | str = await models.unload_lora_adapter(request)
    return answer


async def load_adapter(models: Any, request: Any) -> ErrorResponse | str:
    """`POST /v1/load_lora_adapter`: reads and checks an adapter, and serves it from now on.

    A call that has waited while an equal one loaded the adapter succeeds with it.
    """
    name, path = request.lora_name, request.lora_path
    if (refusal := _refuse_text(models, name, path)) is not None:
        return refusal
    success = f"Success: LoRA adapter '{name}' added successfully."
    before = public_names(models).get(name)
    async with lock_of(models, name):
        if was_loaded(public_names(models), request, before):
            return success
        if (refusal := _refuse_load(models, request)) is not None:
            return refusal
        goes_on = public_names(models).get(name) if request.swap else None
        # A new number: what was computed with an older version is never taken for this. Requests
        # that go on with it have the number that they began with.
        lora = LoRARequest(
            lora_name=name,
            lora_int_id=goes_on.lora_int_id if goes_on else models.lora_id_counter.inc(1),
            lora_path=path,
            load_inplace=request.swap is not None,
            is_3d_lora_weight=request.is_3d_lora_weight,
        )
        if (refused := await admit(models, lora)) is not None:
            if not goes_on:
                without_waiting(remove(models, lora))  # another engine may have taken it
            return refused
        # In place, it would be read again for each request.
        await serve(models, msgspec.structs.replace(lora, load_inplace=False))
        logger.info("Loaded LoRA adapter: name '%s', path '%s'", name, shown_name(path))
        return success


async def unload_adapter(models: Any, request: Any) -> ErrorResponse | str:
    """`POST /v1/unload_lora_adapter`: refuses new requests at once, and frees the memory.

    Answers when the adapter's running requests have ended, or have been ended, and its slot and
    host memory are free in every worker.
    """
    if (fault := name_fault(request.lora_name)) is not None:
        return no_such_name(request.lora_name, fault, "lora_name")
    async with lock_of(models, request.lora_name):
        lora = public_names(models).get(request.lora_name)
        if lora is None:
            message = f"The lora adapter '{request.lora_name}' cannot be found."
            return error_response(HTTPStatus.NOT_FOUND, message, param="lora_name")
        del public_names(models)[request.lora_name]
        await shared_names.retract(models, lora)
    await remove(models, lora)
    without_waiting(remove_later(models, lora))
    logger.info("Removed LoRA adapter: name '%s'", lora.lora_name)
    return f"Success: LoRA adapter '{lora.lora_name}' removed successfully."


def _refuse_text(models: Any, name: str, path: str) -> AdapterErrorResponse | None:
    """Why what a client has sent is not even looked for; None if it is."""
    if (fault := name_fault(name)) is not None:
        shown = shown_name(name)
        return _bad(f"the adapter's name '{shown}' {fault}: give it a short, printable one")
    if (fault := path_fault(path)) is not None:
        shown = shown_name(path)
        return _bad(f"adapter {name!r}: '{shown}' is no path, since it {fault}", "lora_path")
    return one_too_many(models, name, "lora_name")


def _refuse_load(models: Any, request: Any) -> AdapterErrorResponse | None:
    """Why an adapter cannot have its name now; None if it can."""
    name, client = request.lora_name, models.engine_client
    if not name or not request.lora_path:
        message = "Both 'lora_name' and 'lora_path' must be provided."
    elif models.is_base_model(name) and not settings_of(client.vllm_config).base_alias:
        message = f"The lora adapter '{name}' conflicts with a served base model, unless "
        message += "--multilora-base-alias is given."
    elif not request.load_inplace and name in public_names(models):
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            f"in place, set 'load_inplace' to True."
        )
    else:
        return _refuse_swap(models, request, public_names(models).get(name))
    return _bad(message)


def _refuse_swap(
    models: Any, request: Any, previous: LoRARequest | None
) -> AdapterErrorResponse | None:
    """Why a load must not replace the version before, or not in flight; None if it may."""
    version = previous and registered_versions.find(models.engine_client, previous)
    if what := unexpected(version, request.expected_version):
        message = f"adapter {request.lora_name!r}: {what}"
        return error_response(HTTPStatus.CONFLICT, message, param="expected_version")
    if request.swap is None:
        return None
    servers = models.engine_client.vllm_config.parallel_config._api_process_count
    faults = {
        "needs 'load_inplace': true": not request.load_inplace,
        "is an adapter directory's": previous and previous.lora_int_id >= FIRST_NUMBER,
        f"has {servers} API servers, which need --api-server-count 1": servers > 1,
        "may bring a chat template": OWN_TEMPLATES.is_set(models.engine_client),
    }
    fault = next((fault for fault, is_so in faults.items() if is_so), None)
    return _bad(f"no swap in flight: {request.lora_name!r} {fault}", "swap") if fault else None


def name_refusal(models: Any, name: str) -> AdapterErrorResponse | None:
    """The answer where an adapter may not have a name: a route's, or a kind of message part."""
    if is_reserved(models, name):
        return _bad(
            f"vLLM applies an adapter that is named {name!r} to all chats with a part of that "
            f"kind; give it another name"
        )
    if name not in (ROUTE_NAMES.get(models) or ()):
        return None
    return _bad(
        f"the name {name!r} is a route's; give the adapter another one, or take the route out of "
        f"the routes file"
    )


def one_too_many(models: Any, name: str, param: str) -> AdapterErrorResponse | None:
    """The answer where the server has as many adapters as it can, and a name is none of theirs."""
    if name in public_names(models) or len(public_names(models)) < MAX_ADAPTERS:
        return None
    return _bad(
        f"adapter {name!r}: this server has {MAX_ADAPTERS} adapters, and serves no more; "
        f"unload one first",
        param,
    )


def no_such_name(name: str, fault: str, param: str) -> AdapterErrorResponse:
    message = f"There is no adapter of the name '{shown_name(name)}': no name {fault}."
    return error_response(HTTPStatus.NOT_FOUND, message, param=param)


def no_such_model(models: Any, name: str | None) -> str:
    """What vLLM says to a request for a model that does not exist; tenants see no other names."""
    caller, served = current_caller.get(), ", ".join(m.name for m in models.base_model_paths)
    aliases = "" if caller is not None and caller.tenant else f" Valid aliases: {served}."
    return f"The model `{name}` does not exist.{aliases}"


async def admit(models: Any, lora: LoRARequest, param: str = "lora_path") -> ErrorResponse | None:
    """Has the engine read and check an adapter; returns why not to serve what a field names."""
    try:
        await register(models.engine_client, lora)
    except Exception as error:
        return _refusal(lora, error, param)
    return None


def is_current(models: Any, lora: LoRARequest) -> bool:
    """Whether an adapter, in this version, still has its name; of a blend, whether all parts do."""
    named, table = [(lora.lora_name, lora.lora_int_id)], public_names(models)
    if (blend := blend_of(lora)) is not None:
        named = [(part.name, part.number) for part in blend.parts]
    return all(name in table and table[name].lora_int_id == number for name, number in named)


async def serve(models: Any, lora: LoRARequest) -> None:
    """Has an adapter's name lead to it in all API servers, and frees what it has replaced."""
    previous = public_names(models).get(lora.lora_name)
    public_names(models)[lora.lora_name] = lora
    await shared_names.publish(models, lora)
    # By then the name may lead to another API server's adapter. That server frees what it has
    # replaced itself, but does not know of this one.
    for replaced in (previous, lora):
        if replaced is not None and not is_current(models, replaced):
            without_waiting(remove_later(models, replaced))


async def remove(models: Any, lora: LoRARequest) -> None:
    """Frees an adapter's slot and host memory; returns when its running requests have ended."""
    registered_versions.forget(models.engine_client, lora.lora_int_id)
    if (templates := OWN_TEMPLATES.get(models.engine_client)) is not None:
        templates.known.pop(lora.lora_int_id, None)
    core = models.engine_client.engine_core
    await answer_of(core, core.remove_lora_async(lora.lora_int_id))


async def remove_later(models: Any, lora: LoRARequest, delay_s: float = GRACE_S) -> None:
    """Removes an adapter when requests that had found its name have reached the engine."""
    await asyncio.sleep(delay_s)
    # A folder that was put back as it was has the number that it had.
    if not is_current(models, lora):
        await remove(models, lora)


def start(models: Any) -> None:
    """Sees to it that no adapter stays with the engine for a request that came late."""

    def see_off(lora: LoRARequest) -> None:
        if is_current(models, lora):
            return
        call = current_call.get()
        if call is not None and call.ran is not None:  # this goes on with an answer
            if registered_versions.find(models.engine_client, lora) is not None:
                return  # whoever has taken the name away will remove the adapter
            # It was removed between two requests to the engine for one answer: steps of a beam
            # search, parts of a recording, what comes before and after the call of a tool. This
            # one would bring it back, with other weights perhaps than the answer's first part has.
            raise metering.replaced(lora.lora_name)
        # Its name has gone while the request was on its way, maybe longer than an unload waits.
        without_waiting(remove_later(models, lora, LATE_GRACE_S))

    SEE_OFF.set(models.engine_client.output_processor, see_off)


_tasks: set[asyncio.Task[Any]] = set()


def in_background(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    task = asyncio.create_task(work)
    _tasks.add(task)  # the event loop keeps weak references only
    task.add_done_callback(_tasks.discard)
    return task


def without_waiting(removal: Coroutine[Any, Any, None]) -> None:
    async def tell_of_failures() -> None:
        try:
            await removal
        except EngineDeadError:
            pass  # and has no adapters any more
        except Exception as error:  # an engine that is about to end refuses to
            logger.warning("An adapter stays in an engine that did not remove it: %s", error)

    in_background(tell_of_failures())


async def to_its_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Does some work whole, for a request too whose client disconnects meanwhile.

    What the engine reads it reads all the same. Whoever has asked for it has to free it again, and
    holds its locks until then.
    """
    task = in_background(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _refusal(lora: LoRARequest, error: Exception, param: str) -> AdapterErrorResponse:
    if not isinstance(error, AdapterRefusedError):
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(error, GracefulHTTPError):
            status = error.http_status
        return error_response(status, f"adapter {lora.lora_name!r}: {error}", param=param)
    problems = [
        Problem.from_dict(problem).with_texts(lambda text: without_folder(text, lora))
        for problem in error.problems
    ]
    is_forbidden = any(problem.code == Code.NOT_ALLOWED for problem in problems)
    status = HTTPStatus.FORBIDDEN if is_forbidden else STATUS[error.failure.kind]
    message = without_folder(str(error), lora)
    return error_response(status, f"adapter {lora.lora_name!r}: {message}", problems, param)


def error_response(
    status: HTTPStatus,
    message: str,
    problems: Sequence[Problem] = (),
    param: str = "lora_path",
) -> AdapterErrorResponse:
    """An answer that says what is wrong, all problems included, and with which of the fields."""
    kind, code = TYPES[status], status.value
    error = AdapterErrorInfo(
        message=message, type=kind, param=param, code=code, problems=list(problems)
    )
    return AdapterErrorResponse(error=error)


def _bad(message: str, param: str = "lora_name") -> AdapterErrorResponse:
    return error_response(HTTPStatus.BAD_REQUEST, message, param=param)
