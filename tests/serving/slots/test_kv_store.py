"""A store of KV blocks that outlives servers never gives one adapter what another has computed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.attacks.poison import poisoned
from vllm_multilora.errors import ConfigError

from ..engine import (
    BLOCK_SIZE,
    answer,
    assert_as_peft,
    assert_others_as_peft,
    generate,
    running_engine,
)
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from .test_prefix_keys import changed_by_a_byte, reordered, request

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

FIRST, SECOND = (recipe.name for recipe in LINEAR_RECIPES[:2])
PROMPT = [5 * number % 97 + 1 for number in range(2 * BLOCK_SIZE + 5)]


@contextmanager
def engine_with(base: Path, store: Path) -> Iterator["LLM"]:
    """An engine whose own prefix cache is off: what it finds, it finds in the store."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="DiskConnector",
        kv_connector_module_path=f"{__package__}.disk_connector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(store)},
    )
    with running_engine(
        base, in_process=True, kv_transfer_config=transfer, enable_prefix_caching=False
    ) as llm:
        yield llm


def found(llm: "LLM", name: str, number: int, folder: Path) -> int:
    """How many of the prompt's tokens an adapter finds in the store."""
    (output,) = generate(llm, [PROMPT], [request(name, number, folder)], max_tokens=1)
    return output.num_cached_tokens


def long_case(scenario: Scenario, name: str) -> Case:
    return max(scenario.cases_of(name), key=lambda case: len(case.prompt))


def test_weights_find_what_they_have_computed_before_a_restart_and_no_others_do(
    llama: Scenario, tmp_path: Path
) -> None:
    """Nor does anybody find what an adapter has left that overflows."""
    first, store, deployed = llama.adapters[FIRST], tmp_path / "store", tmp_path / "deployed"
    failing = {
        "poison": poisoned(first, tmp_path / "poison", "float32"),
        "gone": tmp_path / "gone",
    }
    cases = {name: long_case(llama, name) for name in (FIRST, SECOND)}
    prompts = [Case("deployed", case.prompt, case.expected) for case in cases.values()]
    scenario = Scenario(llama.base, {"deployed": deployed, **failing}, ())
    bad = [Case(name, prompts[0].prompt, prompts[0].expected) for name in failing]
    shutil.copytree(first, deployed)
    with engine_with(llama.base, store) as llm:
        assert found(llm, "first", 1, first) == 0
        assert found(llm, "first", 1, first) == 2 * BLOCK_SIZE
        assert found(llm, "second", 2, llama.adapters[SECOND]) == 0
        assert_as_peft(answer(llm, scenario, prompts[:1]), prompts[:1])
        answer(llm, scenario, prompts[1:])  # stored under the old weights
        asked = [*bad, *prompts[:1]]
        assert_others_as_peft(answer(llm, scenario, asked), asked, failing)
    shutil.copytree(llama.adapters[SECOND], deployed, dirs_exist_ok=True)
    with engine_with(llama.base, store) as llm:
        # In another order, under other names and numbers.
        other = changed_by_a_byte(first, tmp_path / "other")
        assert found(llm, "first", 1, other) == 0
        assert found(llm, "again", 2, llama.adapters[SECOND]) == 2 * BLOCK_SIZE
        assert found(llm, "alias", 3, reordered(first, tmp_path / "alias")) == 2 * BLOCK_SIZE
        # Of a name and path that had other weights, nothing that these have computed.
        assert len(prompts[1].prompt) > BLOCK_SIZE
        assert_as_peft(answer(llm, scenario, prompts[1:]), prompts[1:])
        asked = [*bad, *prompts[1:]]
        again = answer(llm, scenario, asked)
        assert again[2].num_cached_tokens >= BLOCK_SIZE
        assert_others_as_peft(again, asked, failing)


@pytest.mark.parametrize("is_nested", [False, True], ids=["alone", "among others"])
def test_a_store_that_goes_by_tokens_alone_is_refused(
    llama: Scenario, tmp_path: Path, is_nested: bool
) -> None:
    from vllm.config import KVTransferConfig

    tokens = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    offload = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [offload, tokens]},
    }
    transfer = KVTransferConfig(**(several if is_nested else tokens))
    with (
        pytest.raises(ConfigError, match="ExampleConnector looks up blocks by their tokens alone"),
        running_engine(llama.base, kv_transfer_config=transfer),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "module", "is_known"),
    [
        ("OffloadingConnector", None, True),
        ("NixlConnector", None, True),
        ("FlexKVConnectorV1", None, False),
        ("OffloadingConnector", "somebody.elses", False),
    ],
)
def test_of_a_store_that_nobody_knows_the_log_warns(
    caplog: pytest.LogCaptureFixture, name: str, module: str | None, is_known: bool
) -> None:
    from vllm.config import KVTransferConfig

    from vllm_multilora.integration.api_server import engine_settings

    logger = engine_settings.logger
    logger.addHandler(caplog.handler)
    try:
        engine_settings.require_adapters_apart(
            KVTransferConfig(kv_connector=name, kv_connector_module_path=module, kv_role="kv_both")
        )
    finally:
        logger.removeHandler(caplog.handler)
    warned = [
        record for record in caplog.records if "does not know the KV connector" in record.message
    ]
    assert bool(warned) is not is_known
