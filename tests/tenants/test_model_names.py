"""Which models a tenant may name, with a routes file that changes."""

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.lora.request import LoRARequest

from vllm_multilora.gateway.names.models_list import card_for, models_for
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.server.names import adapter_directory, blend_names, registration
from vllm_multilora.integration.server.names.model_names import Chosen, choose
from vllm_multilora.integration.server.names.registration import no_such_model
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


def choose_for(models: Any, who: Caller | None, name: str | None, path: str = "", **fields: Any):
    """What answers somebody's request, or the answer that refuses it; and the request."""

    async def chosen():
        current_caller.set(who)
        call = HttpCall({}, path=path)
        current_call.set(call)
        return await choose(call, models, name, fields), call

    return asyncio.run(chosen())


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
@pytest.mark.parametrize("name", ["base", "nobody"])
def test_server_that_only_renders_prompts_leaves_names_to_vllm(who, name):
    """Such a server has the one of vLLM's two model tables that needs no engine."""
    registry = OpenAIModelRegistry(None, [BaseModelPath("base", "/base")])
    assert choose_for(registry, who and Caller(who), name)[0] == Chosen()


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
    with_engine(models, 1, 2)
    monkeypatch.setattr(blend_names, "why_none", lambda models: None)
    models.path.write_text("routes: {help-acme: acme-a, mixed: {blend: {acme-a: 0.5, zen-a: 0.5}}}")
    choose_for(models, None, "unheard-of")  # and the file is looked at
    chosen, _ = choose_for(models, None, asked, "/v1/completions/render")
    assert chosen.rendered == named


def with_engine(models: Any, *numbers: int) -> None:
    """An engine for which adapters of these numbers are registered."""
    METER.set(processor := SimpleNamespace(), ServerMeter(None))
    models.engine_client = SimpleNamespace(output_processor=processor)
    for number in numbers:
        registered_versions.note(models.engine_client, number, Version("12345678" * 8, 1.0, "lora"))


def tenant(*, adapters: tuple[str, ...] = (), routes: tuple[str, ...] = ()) -> Caller:
    return Caller(
        Role.TENANT,
        account=Account(
            Tenant("acme", adapters=AllowedNames(adapters), routes=AllowedNames(routes))
        ),
    )


def ask(models: Any, who: Caller, name: str) -> Any:
    """What a request for a model is granted; or the status of its answer."""
    chosen, _ = choose_for(models, who, name)
    return who.granted if isinstance(chosen, Chosen) else chosen.error.code


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
    with_engine(models)

    def reported(hides):
        who = tenant(adapters=("acme-*",))
        who.hides_folders = hides
        if asked == "blend":
            refusal, _ = choose_for(models, who, "base", lora_blend={"acme-a": 0.5})
        else:
            refusal, _ = choose_for(models, who, "acme-a")
        return refusal.error.message

    assert "/acme-a" not in reported(True)
    assert "/acme-a/" in reported(False)


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
    with_engine(models, 1)
    models.lora_requests["help-yourself@12345678"] = LoRARequest(name, 9, "/help-yourself")
    chosen, _ = choose_for(models, None, name)
    assert (None if isinstance(chosen, Chosen) else chosen.error.code) == status


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


def test_a_name_that_ends_like_a_version_is_as_unknown_as_any_other(models):
    """Whether it is an adapter's, or asks for a version of one, is not to be told by the answer."""
    with_engine(models)
    models.lora_requests["zen@12345678"] = LoRARequest("zen@12345678", 9, "/zen")

    def reported(name):
        refusal, _ = choose_for(models, tenant(adapters=("acme-*",)), name)
        return refusal.error.message

    assert reported("zen@12345678").replace("zen", "yen") == reported("yen@12345678")


def test_request_stays_with_the_version_that_its_name_stood_for_first(models):
    with_engine(models)
    chosen, call = choose_for(models, None, "acme-a")
    models.lora_requests["acme-a"] = LoRARequest("acme-a", 9, "/acme-a")
    assert chosen.lora.lora_int_id == call.lora.lora_int_id == 1
    assert choose_for(models, None, "acme-a")[0].lora.lora_int_id == 9


def test_a_list_of_models_costs_a_tenant_no_time_for_those_of_others(models):
    """Each line takes the event loop's time, and nobody limits how often a tenant may ask."""
    made = []

    async def show_available_models(seen):
        made.append(set(seen.lora_requests))
        loras = [ModelCard(id=name, parent="base") for name in seen.lora_requests]
        return SimpleNamespace(data=[ModelCard(id="base"), *loras])

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

    def granted(*, is_form: bool, **fields: Any) -> set[str | None]:
        async def chosen():
            current_caller.set(who)
            call = HttpCall({}, is_form=is_form)
            return await choose(call, models, "acme-a", fields)

        who = tenant(adapters=("acme-*",))
        assert isinstance(asyncio.run(chosen()), Chosen)
        return who.granted

    assert granted(is_form=False, language=None) == {"acme-a"}
    assert granted(is_form=True) == {"acme-a", None}
    assert granted(is_form=True, language="en") == {"acme-a"}


def test_no_other_name_is_recommended_to_a_tenant_that_asks_for_an_unknown_one(models):
    refusal, _ = choose_for(models, tenant(adapters=("acme-*",)), "zen-a")
    assert refusal.error.message == "The model `zen-a` does not exist."
    known = "The model `nothing` does not exist. Valid aliases: base."
    assert no_such_model(models, "nothing") == known
