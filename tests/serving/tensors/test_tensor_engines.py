"""Engines that are given adapters as tensors: whose loader it is, and what their settings check."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.signing.signed_folders import KeyPair

from ..engine import lora_request, running_engine
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of, tokens
from .pushes import EXTENSION, NUMBER, assert_answers, push

pytestmark = pytest.mark.serving

OWN_LOADER = "tests.serving.tensors.tensor_loader.OwnLoader"
WAITING = {"additional_config": {"multilora": {"async_loading": False}}}


@pytest.fixture
def _vllms_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there again after a test that has taken it over in this process."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    monkeypatch.setattr(Manager, "_load_adapter", Manager._load_adapter)


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        pytest.param(OWN_LOADER, {"tensor_parallel_size": 2}, id="own-loader-two-workers"),
        pytest.param(EXTENSION, WAITING | {"in_process": True}, id="waiting-for-loads"),
    ],
)
def test_tensors_given_to_workers_answer_as_peft(
    llama: Scenario, extension: str, options: dict[str, Any]
) -> None:
    with running_engine(llama.base, worker_extension_cls=extension, **options) as llm:
        for name in [*llama.adapters][:2]:
            push(llm, llama.adapters[name])
            assert_answers(llm, llama, name)


@pytest.mark.usefixtures("_vllms_own_loader")
def test_adapters_of_a_frameworks_own_loader_answer_as_peft(llama: Scenario) -> None:
    from vllm.lora.request import LoRARequest

    from .tensor_loader import SCHEME, take_over

    take_over()
    with running_engine(llama.base, in_process=True) as llm:
        for name in [*llama.adapters][:2]:
            path = f"{SCHEME}{llama.adapters[name]}"
            lora = LoRARequest(name, NUMBER, path, load_inplace=True)
            assert llm.llm_engine.add_lora(lora)
            case = case_of(llama, name)
            assert tokens(llm, case, LoRARequest(name, NUMBER, path)) == case.expected.tokens


@pytest.mark.parametrize("setting", ["require_digest", "signing_keys"])
def test_tensors_that_nobody_vouches_for_are_refused(
    llama: Scenario, tmp_path: Path, setting: str
) -> None:
    name = next(iter(llama.adapters))
    required = tmp_path / "digests.json"
    required.write_text(json.dumps({str(NUMBER): "0" * 64}))
    files = {"require_digest": required, "signing_keys": KeyPair.make(tmp_path, "ours").public}
    settings = {"multilora": {setting: str(files[setting])}}
    problem = {"require_digest": "digest", "signing_keys": "sign"}[setting]
    with (
        running_engine(
            llama.base, in_process=True, worker_extension_cls=EXTENSION, additional_config=settings
        ) as llm,
        pytest.raises(Exception, match=problem),
    ):
        push(llm, llama.adapters[name])


@pytest.fixture
def _managers_of_a_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework's own code decides in each step which adapters vLLM's manager has."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    original = Manager._apply_adapters

    def apply(manager: Any, requests: set[Any]) -> None:
        original(manager, requests)

    monkeypatch.setattr(Manager, "_apply_adapters", apply)


@pytest.mark.usefixtures("_managers_of_a_framework")
def test_a_frameworks_manager_is_left_alone_unless_checks_are_asked(llama: Scenario) -> None:
    name = next(iter(llama.adapters))
    with running_engine(llama.base, in_process=True) as llm:
        assert llm.llm_engine.add_lora(lora_request(llama, name))
        case = case_of(llama, name)
        assert tokens(llm, case, lora_request(llama, name)) == case.expected.tokens
    settings = {"multilora": {"allowed_roots": ["/"]}}
    with (
        pytest.raises(Exception, match="--multilora-allowed-roots would check no adapter here"),
        running_engine(llama.base, in_process=True, additional_config=settings),
    ):
        pass
