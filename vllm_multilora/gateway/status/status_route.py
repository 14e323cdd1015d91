"""`GET /v1/lora_adapters`: every adapter, its state, and why it failed if it did; or one of them.

Read-only, so it needs no VLLM_ALLOW_RUNTIME_LORA_UPDATING; vLLM's `--api-key` guards it as it
guards all of `/v1`. Where the plugin does not act, there is no such path.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from vllm_multilora.adapters.problems import shown_name
from vllm_multilora.gateway.endpoints import error_answer
from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.integration.engine.adapter_status import TIERS, Report, Row
from vllm_multilora.integration.server.names import adapter_directory, registration
from vllm_multilora.integration.server.names.public_names import public_names
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.engine_calls import engine_reports
from vllm_multilora.states import AT_HAND, NEAREST_FIRST, AdapterState
from vllm_multilora.tenants.rules import STATUS, Role

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Listing = dict[str, Any]
_Ask = Callable[[], Coroutine[Any, Any, tuple[Listing | None, float]]]

_AT_HAND = [state.value for state in AT_HAND]
_TENANT_KEYS = ("id", "object", "state", "kind", "rank", "last_error")
_NEAREST_FIRST = [state.value for state in NEAREST_FIRST]

TIME_LIMIT_S = 30.0
"""A call waits for the engine's running step, which ends much sooner."""

NEW_S = 1.0
"""How long an answer is given again, at least."""

MAX_SHARE = 0.05
"""Share of the engine core's and this server's time that making answers may take. They are made
adapter by adapter, for any tenant who asks, and nobody's request goes on meanwhile. Answers that
are made anew within `NEW_S`, because adapters have come or gone, do not count."""


class RecentListing:
    """The last answer, its ETag, what callers see of it, and the answer that is on its way.

    Used on the server's event loop only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: list[int] = []
        self._answer: asyncio.Task[Listing | None] | None = None
        self._made, self._cost_s = -math.inf, 0.0
        self.tag = ""
        self._shown: tuple[Listing | None, dict[Hashable, bytes]] = (None, {})

    async def get(self, asked: list[int], ask: _Ask) -> Listing | None:
        """Returns an answer that is new enough, whoever has asked for it.

        Args:
            asked: Numbers of the adapters; an answer about others is given where it was costly.
            ask: Asks the engine; returns how many seconds the answer has cost, too.
        """
        while (answer := self._answer) is not None and not answer.done() and self._asked != asked:
            await asyncio.wait([answer])  # one at a time
        if answer is None or (answer.done() and not self._is_new(asked)):
            self._asked = asked
            self._answer = answer = asyncio.create_task(self._note(ask))
        return await asyncio.shield(answer)

    def _is_new(self, asked: list[int]) -> bool:
        # Adapters come and go: what is costly is given again even if it is about others.
        limit_s = self._cost_s / MAX_SHARE
        if self._asked != asked and limit_s <= NEW_S:
            return False
        return self._clock() - self._made < max(NEW_S, limit_s)

    async def _note(self, ask: _Ask) -> Listing | None:
        self._made = -math.inf  # a failure is no answer
        answer, self._cost_s = await ask()
        self._made = self._clock()
        self.tag = f'"{uuid.uuid4().hex}"'
        return answer

    def body(self, answer: Listing, who: Hashable, show: Callable[[], Listing]) -> bytes:
        """Returns an answer as JSON, as somebody sees it; made once, and part of the answer's cost.

        `who` differs between callers who see different parts of it.
        """
        if self._shown[0] is not answer:
            self._shown = answer, {}
        bodies = self._shown[1]
        if who not in bodies:
            begun = self._clock()
            bodies[who] = bytes(JSONResponse(show()).body)
            self._cost_s += self._clock() - begun
        return bodies[who]


class AdaptersRoute:
    """The route of one API server, whose keys are known by `access`; None where it has none."""

    def __init__(self, access: Access | None, recent: RecentListing | None = None) -> None:
        self._access = access
        self._recent = recent or RecentListing()

    def add_to(self, server: FastAPI) -> None:
        for path, ask in (STATUS, self.show), (STATUS + "/{name:path}", self.show_one):
            server.add_api_route(path, ask, methods=["GET"], responses=registration.STATUS_REFUSALS)

    async def show(self, raw_request: Request) -> Response:
        """Answers with the adapters of all engines, as they were within the last second.

        Where an answer costs more than `MAX_SHARE` of a second, it may be older.
        """
        answer, caller = await self._listed(raw_request), current_caller.get()
        who = None if caller is None else (caller.role, caller.tenant)
        models = raw_request.app.state.openai_serving_models
        body = self._recent.body(answer, who, lambda: self._shown(caller, answer, models))
        headers = {"etag": self._recent.tag}
        return Response(body, media_type="application/json", headers=headers)

    async def show_one(self, raw_request: Request, name: str) -> Response:
        """Answers with one adapter: with 503 until it need not be read any more."""
        answer = await self._listed(raw_request)
        rows = [row for row in answer["data"] if row["id"] == name]
        shown = shown_to(current_caller.get(), {**answer, "data": rows})["data"]
        if not shown:
            message = f"There is no adapter of the name '{shown_name(name)}'."
            return error_answer(HTTPStatus.NOT_FOUND, message, path=STATUS)
        is_ready = shown[0]["state"] in _AT_HAND
        return JSONResponse(shown[0], HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def _listed(self, raw_request: Request) -> Listing:
        models = getattr(raw_request.app.state, "openai_serving_models", None)
        if models is None or not registration.acts_for(models):
            raise HTTPException(HTTPStatus.NOT_FOUND)
        registered = list(public_names(models).values())
        asked = [lora.lora_int_id for lora in registered]

        async def ask() -> tuple[Listing | None, float]:
            async with asyncio.timeout(TIME_LIMIT_S):
                reports = await engine_reports(models.engine_client.engine_core, asked)
            if not reports:
                return None, 0.0
            begun = time.perf_counter()
            answer = listing(reports, registered, adapter_directory.refused(models))
            own_s = time.perf_counter() - begun
            # Every API server of this one asks the same engines.
            parallel = models.engine_client.vllm_config.parallel_config
            servers = max(1, parallel._api_process_count)
            return answer, own_s + servers * max(report["seconds"] for report in reports)

        try:
            answer = await self._recent.get(asked, ask)
        except TimeoutError as error:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine did not answer within {TIME_LIMIT_S:.0f} s",
            ) from error
        if answer is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return answer

    def _shown(self, caller: Caller | None, answer: Listing, models: Any) -> Listing:
        shown, access, routes = shown_to(caller, answer), self._access, ROUTES.get(models)
        if routes is not None and (caller is None or caller.role is Role.OPERATOR):
            led = routes.leads_to().items()
            rows = [{"id": name, "object": "route", "leads_to": names} for name, names in led]
            shown = {**shown, "routes": rows}
        if access is not None and access.locks.tenants and caller and caller.role is Role.OPERATOR:
            shown = {**shown, "tenants": access.tenants_now()}
        return shown


def shown_to(caller: Caller | None, listed: dict[str, Any]) -> dict[str, Any]:
    """Returns what a caller may see: operators all, others no folders, tenants their own adapters.

    A tenant does not see how much its adapters are used, nor what is in slots and in host memory:
    others may use the same adapters and the same memory.
    """
    if caller is None:
        return listed
    rows = []
    for row in listed["data"]:
        names = row["parts"] or (row["id"],)
        if not all(caller.may_use(name, is_base=False, is_route=False) for name in names):
            continue
        error = row["last_error"]
        shown = {**row, "last_error": error and caller.shown(error, row["path"])}
        if caller.hides_folders:
            del shown["path"]
        rows.append(shown)
    if caller.tenant is None:
        return {**listed, "data": rows}
    rows = [{key: row[key] for key in _TENANT_KEYS} for row in rows]
    return {"object": listed["object"], "data": rows}


def listing(
    reports: Sequence[Report],
    registered: Iterable[LoRARequest],
    refused: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The route's answer.

    Adapters that the server has names for, and those that requests brought along without
    registration, by name; an old version that requests still end on is left out. With data
    parallelism an adapter's state is that of the engine that has it nearest to serving, counts add
    up, bytes do where engines have different stores, and `engines` says what each engine has.
    `kernels` is there where an engine's workers have chosen kernels: the first engine's.

    `refused` says why versions were refused that the engines know nothing of, by number.
    """
    rows = {lora.lora_int_id: {"id": lora.lora_name, "path": lora.lora_path} for lora in registered}
    served = {row["id"] for row in rows.values()}
    by_id: dict[int, list[tuple[int, Row]]] = {}
    for engine, report in enumerate(reports):
        for row in report["adapters"]:
            by_id.setdefault(row["int_id"], []).append((engine, row))
            if row["name"] is not None and row["name"] not in served:
                rows.setdefault(row["int_id"], {"id": row["name"], "path": row["path"]})
    data = [
        {
            "id": known["id"],
            "object": "lora_adapter",
            "int_id": lora_id,
            "path": known["path"],
            **_merge_engines(by_id.get(lora_id, []), [report["store"] for report in reports]),
        }
        for lora_id, known in rows.items()
    ]
    for row in data:
        if row["int_id"] in refused:
            row["last_error"] = refused[row["int_id"]]
            if row["state"] == AdapterState.ABSENT.value:
                row["state"] = AdapterState.FAILED.value
    kernels = reports[0].get("kernels")
    return {
        "object": "list",
        "data": sorted(data, key=lambda row: (row["id"], row["int_id"])),
        "slots": _totals([report["slots"] for report in reports]),
        # Engines of one machine share their store, and each tells of all that it holds.
        "cpu": _totals(list({report["store"]: report["cpu"] for report in reports}.values())),
        **({"kernels": kernels} if kernels else {}),
    }


def _merge_engines(found: Sequence[tuple[int, Row]], stores: Sequence[str]) -> Row:
    rows = [row for _, row in found]
    best = min(rows, key=lambda row: _NEAREST_FIRST.index(row["state"]), default=None)
    state = best["state"] if best else AdapterState.ABSENT.value
    merged: Row = {
        "state": state,
        "tier": TIERS.get(state, "disk"),
        **{key: best and best[key] for key in ("slot", "kind", "parts", "digest", "loaded")},
        "rank": _most(rows, "rank"),
        "bytes": sum({stores[engine]: row["bytes"] for engine, row in found}.values()),
        "pinned": any(row["pinned"] for row in rows),
        "requests": sum(row["requests"] for row in rows),
        "hits": sum(row["hits"] for row in rows),
        "loads": sum(row["loads"] for row in rows),
        "last_used": _most(rows, "last_used"),
        "last_error": next((e for row in rows if (e := row["last_error"]) is not None), None),
    }
    if len(stores) > 1:
        merged["engines"] = [
            {"engine": engine, **{key: row[key] for key in ("state", "slot", "digest")}}
            for engine, row in found
        ]
    return merged


def _totals(parts: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The sums; None, no limit, where a part has none."""
    columns = {key: [part[key] for part in parts] for key in parts[0]}
    return {key: None if None in values else sum(values) for key, values in columns.items()}


def _most(rows: Sequence[Row], key: str) -> Any:
    return max((row[key] for row in rows if row[key] is not None), default=None)
