"""Slots and host memory of a real engine: what it answers, keeps, reads and gives up."""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.files.test_pickled import Bomb
from tests.attacks.poison import poisoned
from vllm_multilora.metrics.definitions import LOAD_DURATION
from vllm_multilora.metrics.definitions import SLOTS as SLOTS_IN_ALL
from vllm_multilora.store.memory.arena import PAGE
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

from ..cache_probe import CacheProbe
from ..engine import answer, assert_as_peft, assert_others_as_peft, lora_request, running_engine
from ..models.cases import Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

SLOTS, HOST_PLACES = 4, 8


def case_of(fleet: Scenario, number: int) -> Case:
    (case,) = fleet.cases_of(f"customer-{number}")
    return case


def ids(fleet: Scenario, *numbers: int) -> frozenset[int]:
    return frozenset(fleet.adapter_id(f"customer-{number}") for number in numbers)


def assert_answers_as_peft(llm: "LLM", fleet: Scenario, cases: Sequence[Case]) -> None:
    assert_as_peft(answer(llm, fleet, cases), cases)


def assert_answers_beside_failing(
    llm: "LLM", fleet: Scenario, cases: Sequence[Case], root: Path
) -> None:
    """Cases beside one that overflows in use and one without files, which go to `root`."""
    poison = poisoned(fleet.adapters["customer-0"], root / "poison", "float32")
    failing = {"poison": poison, "gone": root / "gone"}
    deployed = Scenario(fleet.base, {**fleet.adapters, **failing}, ())
    asked = [*(replace(cases[0], adapter=name) for name in failing), *cases]
    assert_others_as_peft(answer(llm, deployed, asked), asked, failing)


def shuffled(fleet: Scenario, seed: int = 0) -> list[Case]:
    """Every adapter's case and the base model's, in random order."""
    return random.Random(seed).sample(fleet.cases, len(fleet.cases))


def true_rank_bytes(folder: Path) -> int:
    """Bytes of an adapter's tensors in its own file, which is in the server's dtype."""
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def engine(fleet: Scenario) -> "Iterator[LLM]":
    with running_engine(
        fleet.base,
        in_process=True,
        max_loras=SLOTS,
        max_cpu_loras=HOST_PLACES,
        # Answers that come from cached prefixes would not use the adapter's weights.
        enable_prefix_caching=False,
        additional_config={"multilora": {"pin": ["customer-30"], "allow_pickle": True}},
    ) as llm:
        yield llm


@pytest.fixture
def probe(engine: "LLM") -> CacheProbe:
    return CacheProbe(engine)


def test_forty_adapters_through_four_slots_answer_as_peft(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    for seed in range(3):
        assert_answers_as_peft(engine, fleet, shuffled(fleet, seed))
    view = probe.look()
    assert view.workers_agree
    assert len(view.host) == view.host_adapters == HOST_PLACES
    assert view.reads.total() > len(fleet.adapters)  # evicted and read again


def test_host_memory_is_that_of_the_true_ranks(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    numbers = (0, 1, 2, 3, 4)  # ranks 8, 16, 24, 32, 64
    assert_answers_as_peft(engine, fleet, [case_of(fleet, number) for number in numbers])
    view = probe.look()
    expected = sum(true_rank_bytes(fleet.adapters[f"customer-{n}"]) for n in numbers)
    assert view.host == ids(fleet, *numbers)
    assert view.own_bytes == pytest.approx(expected, rel=0.05)
    assert 0 <= view.host_bytes - view.own_bytes < len(numbers) * PAGE


def test_an_added_adapter_waits_in_free_host_memory(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    assert engine.llm_engine.add_lora(lora_request(fleet, "customer-21"))
    view = probe.look()
    assert view.host == ids(fleet, 21) == engine.llm_engine.list_loras()
    assert view.slots == (None,) * SLOTS
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 21)])
    view = probe.look()
    assert view.in_slots == ids(fleet, 21)
    assert not view.reads


@pytest.mark.parametrize("how", ["by-name", "by-call"])
def test_a_pinned_adapter_keeps_its_slot_while_all_others_come_and_go(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, how: str
) -> None:
    number = 30 if how == "by-name" else 31
    assert_answers_as_peft(engine, fleet, [case_of(fleet, number)])
    (pinned,) = ids(fleet, number)
    if how == "by-call":
        assert engine.llm_engine.pin_lora(pinned)
    slot = probe.look().slots.index(pinned)
    assert_answers_as_peft(engine, fleet, shuffled(fleet))
    view = probe.look()
    assert view.slots[slot] == pinned
    assert pinned not in view.reads  # a slot that it had left would have been filled again
    engine.llm_engine.remove_lora(pinned)


@pytest.mark.smoke("sleep")
def test_adapters_return_to_slots_whose_memory_was_lost(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, tmp_path: Path
) -> None:
    """Beside adapters that fail."""
    cases = [case_of(fleet, number) for number in range(3)]
    assert_answers_as_peft(engine, fleet, cases)
    probe.look()
    probe.lose_slots()
    assert probe.look().slots == (None,) * SLOTS
    assert_answers_as_peft(engine, fleet, cases)
    view = probe.look()
    assert view.in_slots == ids(fleet, 0, 1, 2)
    assert not view.reads  # from host memory
    probe.lose_slots()
    assert_answers_beside_failing(engine, fleet, cases, tmp_path)


def orders(worker: Any) -> int:
    """Runs in the worker: how many slots it was told to fill or to check."""
    count: int = worker.model_runner.lora_manager._orders
    return count


def dummy_batch(worker: Any, adapters: int) -> None:
    """Runs in the worker: a batch of adapters that there are not."""
    worker.model_runner._dummy_run(8, num_active_loras=adapters)


@pytest.mark.parametrize("adapters", [None, 0, 2], ids=["as vLLM has it", "none", "two"])
def test_what_an_idle_rank_computes_leaves_the_slots_as_they_are(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, adapters: int | None
) -> None:
    """While others work, vLLM has it compute such batches."""
    cases = [case_of(fleet, number) for number in range(3)]
    assert_answers_as_peft(engine, fleet, cases)
    before, reported = probe.look(), engine.collective_rpc(orders)
    for _ in range(2):
        if adapters is None:
            engine.collective_rpc("execute_dummy_batch")
        else:
            engine.collective_rpc(dummy_batch, args=(adapters,))
    assert_answers_as_peft(engine, fleet, cases)
    view = probe.look()
    assert (view.slots, view.model_slots) == (before.slots, before.model_slots)
    assert engine.collective_rpc(orders) == reported


def test_pickled_weights_are_served_as_peft_computes_them_where_they_are_allowed(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, tmp_path: Path
) -> None:
    case = case_of(fleet, 3)
    folder = Path(shutil.copytree(fleet.adapters["customer-3"], tmp_path / "pickled"))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    deployed = Scenario(fleet.base, {"pickled": folder}, ())
    assert engine.llm_engine.add_lora(lora_request(deployed, "pickled"))
    assert_answers_as_peft(engine, deployed, [Case("pickled", case.prompt, case.expected)])


def test_a_malicious_pickle_is_refused_where_pickles_are_allowed(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fleet.adapters["customer-4"], tmp_path / "malicious"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "executed"), folder / "adapter_model.bin")
    deployed = Scenario(fleet.base, {"malicious": folder}, ())
    with pytest.raises(Exception, match="without running code"):
        engine.llm_engine.add_lora(lora_request(deployed, "malicious"))
    assert not (tmp_path / "executed").exists()
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 4)])


@pytest.mark.smoke("TP 2", "fully sharded")
def test_two_ranks_answer_as_peft_and_share_one_read(
    fleet: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards, beside adapters that fail. The other engine here has adapters in its store."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with running_engine(
        fleet.base,
        max_loras=SLOTS,
        max_cpu_loras=HOST_PLACES,
        enable_prefix_caching=False,
        tensor_parallel_size=2,
        fully_sharded_loras=True,
        disable_log_stats=False,
    ) as llm:
        probe = CacheProbe(llm)
        # Waiting ranks keep two cores busy, so few: half as many again as have room in memory.
        assert_answers_as_peft(llm, fleet, shuffled(fleet)[: HOST_PLACES * 3 // 2])
        view = probe.look()
        metrics = llm.get_metrics()
        assert_answers_beside_failing(llm, fleet, shuffled(fleet, seed=1)[:3], tmp_path)
    assert view.workers_agree
    # Slots and reads are the engine's, however many workers there are.
    assert [m.value for m in metrics if m.name == SLOTS_IN_ALL.name] == [SLOTS]
    counts = {m.labels["source"]: m.count for m in metrics if m.name == LOAD_DURATION.name}
    assert counts["disk"] == view.reads.total()
    names = list(fleet.adapters)
    whole = sum(true_rank_bytes(fleet.adapters[names[lora_id - 1]]) for lora_id in view.host)
    # Every number is there for one rank only.
    assert view.own_bytes == pytest.approx(whole, rel=0.05)


def test_a_policy_that_fails_ends_nobody(
    fleet: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_policy.py").write_text(
        "class Broken:\n"
        "    def added(self, adapter_id, size, cost): pass\n"
        "    def used(self, adapter_ids, joined): raise RuntimeError('used')\n"
        "    def removed(self, adapter_id): raise RuntimeError('removed')\n"
        "    def victim(self, candidates): raise RuntimeError('victim')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the processes that are started
    with running_engine(
        fleet.base,
        in_process=True,
        max_loras=SLOTS,
        max_cpu_loras=HOST_PLACES,
        additional_config={"multilora": {"cache_policy": "broken_policy:Broken"}},
    ) as llm:
        assert_answers_as_peft(llm, fleet, shuffled(fleet))
