"""Adapters that vLLM's resolvers find; the engine and the resolver are stand-ins."""

import asyncio
import json
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from tests.serving.names.test_adapter_directory import Models, SlowEngine, in_a_loop
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.integration.server.names import registration, resolvers
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.tenants.limits import MAX_FIRST_READINGS, Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant

pytestmark = pytest.mark.serving


class Resolver:
    """Finds what is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base: str, name: str) -> LoRARequest:
        return LoRARequest(name, 1, str(self.folder / name))


@pytest.mark.parametrize("name", ["acme/", "acme//v1", "acme/v1/"])
def test_a_folder_is_found_by_one_name_only(tmp_path: Path, name: str) -> None:
    """Else clients could have a server hold one adapter under as many names as they like."""
    folder = tmp_path / "acme" / "v1"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent):
        config = {"peft_type": "LORA", "base_model_name_or_path": "base"}
        (each / "adapter_config.json").write_text(json.dumps(config))
    resolver, settings = FilesystemResolver(str(tmp_path)), MultiLoRAConfig()
    assert resolvers._look(resolver, "base", name, settings) is None
    for known in ("acme", "acme/v1"):
        assert resolvers._look(resolver, "base", known, settings) is not None


def test_no_more_adapters_are_resolved_than_a_server_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(registration, "MAX_ADAPTERS", 1)
    monkeypatch.setattr(registration, "admit", None)  # is not asked
    models: Any = Models(SlowEngine())
    models.lora_resolvers = [Resolver(tmp_path)]
    models.model_config = SimpleNamespace(model="base")
    models.lora_requests["other"] = LoRARequest("other", 1, "/adapters/other")
    refusal = asyncio.run(resolvers._resolve(models, "acme"))
    assert refusal is not None
    assert refusal.error.code == HTTPStatus.BAD_REQUEST
    assert "this server has 1 adapters" in refusal.error.message


@in_a_loop
async def test_few_names_of_a_tenant_are_resolved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' names wait for the same threads, and their adapters behind those that are found."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    under_way = most = 0

    async def resolve(models: Any, name: str) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    monkeypatch.setattr(resolvers, "_resolve", resolve)
    models: Any = Models(SlowEngine())
    models.lora_resolvers = [Resolver(tmp_path)]
    current_caller.set(Caller(Role.TENANT, account=Account(Tenant("acme"))))
    await asyncio.gather(*(resolvers.prepare(models, f"acme-{n}") for n in range(20)))
    assert most == MAX_FIRST_READINGS


@in_a_loop
async def test_what_is_read_for_a_client_that_disconnects_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the engine would hold, under a number that nobody knows, one more for each of them."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "adapter_model.safetensors").write_text("good")

    engine = SlowEngine()
    models: Any = Models(engine)
    models.lora_resolvers = [Resolver(tmp_path)]
    models.model_config = SimpleNamespace(model="base")
    models.lora_id_counter = SimpleNamespace(inc=lambda by: 17)
    await engine.read_for_nobody(asyncio.create_task(resolvers.prepare(models, "acme")))
    assert engine.held == {17: "good"}
    assert models.lora_requests["acme"].lora_int_id == 17
