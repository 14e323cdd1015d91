"""Which models a tenant may name, with a routes file that changes."""

import asyncio
import io
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import UploadFile
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from tests.tenants.callers import as_caller
from vllm_multilora.gateway.names.models_list import card_for, models_for
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.patching.tables.ledger import apply_patches
from vllm_multilora.integration.server.names import adapter_directory, blend_names, registration
from vllm_multilora.integration.server.names.model_names import (
    check_model,
    check_pooling_model,
    prepare,
)
from vllm_multilora.integration.server.names.routes import ROUTES, ServerRoutes
from vllm_multilora.integration.server.requests.callers import (
    Caller,
    current_caller,
    error_response,
)
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import AllowedNames, Tenant


@pytest.fixture
def models(tmp_path):
    """Two tenants' adapters, and a route to each."""
    path = tmp_path / "routes.yaml"
    path.write_text("routes: {help-acme: acme-a, help-zen: zen-a, help-zen@12345678: zen-a}")
    found = SimpleNamespace(
        path=path,
        engine_client=None,
        base_model_paths=[SimpleNamespace(name="base")],
        is_base_model=lambda name: name == "base",
        lora_requests={
            name: LoRARequest(name, number, f"/{name}")
            for number, name in enumerate(("acme-a", "zen-a", "help-yourself"), 1)
        },
    )
    ROUTES.set(found, ServerRoutes(found, str(path)))
    return found


@pytest.mark.parametrize("who", [None, Role.OPERATOR], ids=["without-keys", "with-keys"])
def test_a_server_that_only_renders_prompts_knows_its_model(who):
    """Such a server has the one of vLLM's two model tables that needs no engine."""
    serving = object.__new__(type("Serving", (BaseServing,), {}))
    serving.models = OpenAIModelRegistry(None, [BaseModelPath("base", "/base")])
    serving.request_logger = None

    async def status(name: str) -> int | None:
        current_caller.set(who and Caller(who))
        refusal = await serving._check_model(SimpleNamespace(model=name, messages=[]))
        return refusal and refusal.error.code

    apply_patches()
    assert asyncio.run(status("base")) is None
    assert asyncio.run(status("nobody")) == 404


def test_a_server_that_only_renders_prompts_lists_its_model_as_any_other():
    registry = OpenAIModelRegistry(
        SimpleNamespace(max_model_len=128), [BaseModelPath("base", "/folder/base")]
    )

    def listed(who: Caller | None) -> dict[str, str]:
        shown = asyncio.run(models_for(who, registry))
        return {card.id: card.root for card in shown.data}

    of_tenant = tenant(adapters=("*",))
    of_tenant.hides_folders = True
    assert listed(None) == listed(Caller(Role.OPERATOR)) == {"base": "/folder/base"}
    assert listed(Caller(Role.CLIENT, hides_folders=True)) == {"base": "base"}
    assert listed(of_tenant) == {}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("acme-a", "acme-a"),
        ("acme-a@12345678", "acme-a@12345678"),
        ("help-acme", "acme-a"),
        ("mixed", "mixed"),
    ],
    ids=["adapter", "version", "route", "route-to-a-blend"],
)
def test_a_rendered_request_names_what_is_to_answer_it(models, asked, named, monkeypatch):
    """By a name that `/inference/v1/generate` takes, whatever vLLM sends there."""
    processor = SimpleNamespace()
    METER.set(processor, ServerMeter(None))
    models.engine_client = SimpleNamespace(output_processor=processor)
    for number in (1, 2):
        registered_versions.note(models.engine_client, number, Version("12345678" * 8, 1.0, "lora"))
    monkeypatch.setattr(blend_names, "why_none", lambda models: None)
    models.path.write_text("routes: {help-acme: acme-a, mixed: {blend: {acme-a: 0.5, zen-a: 0.5}}}")

    async def original(serving, request):
        return None

    async def rendered():
        current_call.set(HttpCall({}, renders=True))
        await ROUTES.get(models)._refresh()
        request = SimpleNamespace(model=asked)
        serving = SimpleNamespace(models=models)
        assert await check_model(original, serving, request) is None
        return request.model

    assert asyncio.run(rendered()) == named


def test_each_request_of_a_batch_is_followed_as_over_http(models):
    """`vllm run-batch` brings no HTTP along; its requests may be one task's."""

    async def original(serving, request):
        return None

    async def batch():
        found = []
        for name in ("help-acme", "acme-a", "help-zen"):
            request = SimpleNamespace(model=name)
            assert await check_model(original, SimpleNamespace(models=models), request) is None
            call = current_call.get()
            found.append((call.route, request.model))
        return found

    assert asyncio.run(batch()) == [
        ("help-acme", "acme-a"),
        (None, "acme-a"),
        ("help-zen", "zen-a"),
    ]


def tenant(*, adapters: tuple[str, ...] = (), routes: tuple[str, ...] = ()) -> Caller:
    return Caller(
        Role.TENANT,
        account=Account(
            Tenant("acme", adapters=AllowedNames(adapters), routes=AllowedNames(routes))
        ),
    )


def ask(models: Any, who: Caller, name: str) -> Any:
    """What a request for a model is granted; or the status of its answer."""

    async def original(serving, request):
        return None

    def refuse(*, status_code, **_):
        return SimpleNamespace(error=SimpleNamespace(code=status_code))

    serving = SimpleNamespace(models=models, create_error_response=refuse)

    async def check():
        current_caller.set(who)
        return await check_model(original, serving, SimpleNamespace(model=name))

    refusal = asyncio.run(check())
    return who.granted if refusal is None else refusal.error.code


@pytest.mark.parametrize("pattern", ["*", "help-*"])
def test_a_right_to_routes_is_none_to_adapters_of_such_names(models, pattern):
    def who():
        return tenant(routes=(pattern,))

    assert ask(models, who(), "help-zen") == {"zen-a"}
    assert ask(models, who(), "zen-a") == 404
    assert ask(models, who(), "help-yourself") == 404
    shown = card_for(who(), SimpleNamespace(id="help-yourself"), is_base=False, is_route=False)
    assert shown is None


def test_a_right_to_adapters_is_none_to_routes_of_such_names(models):
    assert ask(models, tenant(adapters=("help-*",)), "help-yourself") == {"help-yourself"}
    assert ask(models, tenant(adapters=("help-*",)), "help-zen") == 404


def test_a_route_that_has_just_been_written_is_a_route_for_everybody(models):
    models.path.write_text("routes: {help-new: zen-a}")
    assert ask(models, tenant(adapters=("help-*",)), "help-new") == 404
    models.path.write_text("routes: {help-newer: zen-a}")
    assert ask(models, tenant(routes=("help-*",)), "help-newer") == {"zen-a"}


def test_nobody_has_the_file_read_by_names_that_are_not_theirs(models):
    models.path.write_text("routes: {help-new: zen-a}")
    assert ask(models, tenant(adapters=("acme-*",), routes=("acme-*",)), "help-new") == 404
    assert "help-new" not in ROUTES.get(models)


@pytest.mark.parametrize("asked", ["adapter", "blend"])
def test_a_refusal_names_no_folder_to_who_may_see_none(models, asked, monkeypatch):
    answer = error_response(HTTPStatus.BAD_REQUEST, "/acme-a/adapter_config.json: no JSON")

    async def refuse(models, name):
        return answer  # to whoever asks

    monkeypatch.setattr(adapter_directory, "prepare", refuse)
    monkeypatch.setattr(blend_names, "why_none", lambda models: None)
    monkeypatch.setattr(blend_names, "is_active_behind", lambda client: True)
    processor = SimpleNamespace()
    METER.set(processor, ServerMeter(None))
    models.engine_client = SimpleNamespace(output_processor=processor)
    request = SimpleNamespace(model="acme-a")
    if asked == "blend":
        request = SimpleNamespace(model="base", lora_blend={"acme-a": 0.5})

    async def told(hides):
        who = tenant(adapters=("acme-*",))
        who.hides_folders = hides
        current_caller.set(who)
        refusal = await check_model(None, SimpleNamespace(models=models), request)
        return refusal.error.message

    assert "/acme-a" not in asyncio.run(told(True))
    assert "/acme-a/" in asyncio.run(told(False))


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("acme-a@12345678", None),
        ("acme-a@87654321", 409),
        ("zen-a@12345678", 409),
        ("base@12345678", 404),
        ("help-yourself@12345678", None),
        ("help-zen@12345678", None),
    ],
    ids=["served", "another-is-served", "not-read-yet", "base-model", "a-name", "a-route"],
)
def test_a_version_that_is_not_served_is_not_answered_by_another(models, name, status):
    METER.set(processor := SimpleNamespace(), ServerMeter(None))
    models.engine_client = SimpleNamespace(output_processor=processor)
    registered_versions.note(models.engine_client, 1, Version("12345678" * 8, 1.0, "lora"))
    models.lora_requests["help-yourself@12345678"] = LoRARequest(name, 9, "/help-yourself")

    async def original(serving, request):
        return None

    async def asked():
        current_call.set(HttpCall({}))
        request = SimpleNamespace(model=name)
        return await check_model(original, SimpleNamespace(models=models), request)

    refusal = asyncio.run(asked())
    assert (refusal and refusal.error.code) == status


def test_a_blend_stands_for_all_of_its_parts_in_their_versions(models):
    weights, client = (("acme-a", 1.0), ("zen-a", 0.5)), SimpleNamespace()
    blend = blend_names.blend_now(models, weights)
    assert registration.is_current(models, blend)
    registered_versions.note(client, 1, Version("1" * 64, 1.0, "lora"))
    assert registered_versions.find(client, blend) is None
    registered_versions.note(client, 2, Version("2" * 64, 1.0, "lora"))
    assert registered_versions.find(client, blend) is not None
    models.lora_requests["zen-a"] = LoRARequest("zen-a", 9, "/zen-a")
    assert not registration.is_current(models, blend)
    del models.lora_requests["acme-a"]
    assert blend_names.blend_now(models, weights) is None


def test_a_changed_file_takes_no_name_from_an_adapter(models):
    models.path.write_text("routes: {help-acme: acme-a, zen-a: acme-a}")
    assert ask(models, tenant(routes=("*",)), "unheard-of") == 404  # and the file is looked at
    assert ask(models, tenant(adapters=("zen-a",)), "zen-a") == {"zen-a"}


@pytest.mark.parametrize("check", [check_model, check_pooling_model])
def test_a_name_that_ends_like_a_version_is_as_unknown_as_any_other(models, check):
    """Whether it is an adapter's, or asks for a version of one, is not to be told by the answer."""
    processor = SimpleNamespace()
    METER.set(processor, ServerMeter(None))
    models.engine_client = SimpleNamespace(output_processor=processor)
    models.lora_requests["zen@12345678"] = LoRARequest("zen@12345678", 9, "/zen")
    refuse = BaseServing.create_error_response
    serving = SimpleNamespace(models=models, create_error_response=refuse)

    async def told(name):
        current_caller.set(tenant(adapters=("acme-*",)))
        try:
            refusal = await check(None, serving, SimpleNamespace(model=name))
        except VLLMNotFoundError as error:
            return str(error)
        return refusal.error.message

    theirs, nobodys = (asyncio.run(told(name)) for name in ("zen@12345678", "yen@12345678"))
    assert theirs.replace("zen", "yen") == nobodys


def test_a_list_of_models_costs_a_tenant_no_time_for_those_of_others(models):
    """Each line takes the event loop's time, and nobody limits how often a tenant may ask."""
    made = []

    async def show_available_models(seen):
        made.append(set(seen.lora_requests))
        cards = [ModelCard(id="base"), *(ModelCard(id=name) for name in seen.lora_requests)]
        return SimpleNamespace(data=cards)

    methods = {"show_available_models": show_available_models}
    models = type("Models", (SimpleNamespace,), methods)(**vars(models))

    def listed(who: Caller | None) -> set[str]:
        shown = asyncio.run(models_for(who, models))
        return {card.id for card in shown.data}

    everything = {"acme-a", "zen-a", "help-yourself"}
    routes = {"help-acme", "help-zen", "help-zen@12345678"}
    assert listed(tenant(adapters=("acme-*",), routes=("help-zen",))) == {"acme-a", "help-zen"}
    assert listed(Caller(Role.CLIENT)) == {"base", *everything, *routes}
    assert made == [{"acme-a"}, everything]
    assert set(models.lora_requests) == everything


def test_only_a_recording_has_its_language_found_by_the_base_model(models):
    """Other requests may have any field, one of that name included."""

    def granted(request: Any) -> set[str | None]:
        who = tenant(adapters=("acme-*",))
        prepared = as_caller(
            who, lambda: asyncio.run(prepare(SimpleNamespace(models=models), request))
        )
        assert prepared is None
        return who.granted

    fields = {"model": "acme-a", "language": None}
    chat = {**fields, "messages": [{"role": "user", "content": "?"}]}
    assert granted(ChatCompletionRequest.model_validate(chat)) == {"acme-a"}
    recording = {**fields, "file": UploadFile(io.BytesIO())}
    assert granted(TranscriptionRequest.model_validate(recording)) == {"acme-a", None}
    recording["language"] = "en"
    assert granted(TranscriptionRequest.model_validate(recording)) == {"acme-a"}
