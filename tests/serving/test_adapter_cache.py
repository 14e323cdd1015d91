"""The three-tier cache in a real engine: what it answers, keeps, loads and gives up."""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.test_pickled import Bomb
from vllm_multilora.metrics.definitions import LOAD_DURATION
from vllm_multilora.metrics.definitions import SLOTS as SLOTS_IN_ALL

from .cache_probe import CacheProbe, CacheView
from .cases import Case, Scenario
from .engine import answer, running_engine

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

SLOTS, HOST_PLACES = 4, 8


def lora_request(fleet: Scenario, name: str) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, fleet.adapter_id(name), str(fleet.adapters[name]))


def case_of(fleet: Scenario, number: int) -> Case:
    (case,) = fleet.cases_of(f"customer-{number}")
    return case


def ids(fleet: Scenario, *numbers: int) -> set[int]:
    return {fleet.adapter_id(f"customer-{number}") for number in numbers}


def assert_answers_as_peft(llm: "LLM", fleet: Scenario, cases: Sequence[Case]) -> None:
    outputs = answer(llm, fleet, cases)
    wrong = [
        case.adapter
        for case, output in zip(cases, outputs, strict=True)
        if tuple(output.outputs[0].token_ids) != case.expected.tokens
    ]
    assert not wrong


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
    view = probe.look_at_one()
    assert view.slots == view.model_slots
    assert len(view.host) == HOST_PLACES
    assert view.counts()["loaded"] > len(fleet.adapters)  # evicted and read again


def test_host_memory_is_that_of_the_true_ranks(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    numbers = (0, 1, 2, 3, 4)  # ranks 8, 16, 24, 32, 64
    assert_answers_as_peft(engine, fleet, [case_of(fleet, number) for number in numbers])
    view = probe.look_at_one()
    expected = sum(true_rank_bytes(fleet.adapters[f"customer-{n}"]) for n in numbers)
    assert view.host_bytes == view.buffer_bytes
    assert view.host_bytes == pytest.approx(expected, rel=0.05)


def test_a_batch_never_evicts_its_own_adapter(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    """With the oldest and a new adapter in one batch, the new one takes another's slot."""
    for number in range(SLOTS):
        assert_answers_as_peft(engine, fleet, [case_of(fleet, number)])
    probe.look()
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 0), case_of(fleet, SLOTS)])
    view = probe.look_at_one()
    (new,) = ids(fleet, SLOTS)
    assert view.adapters("loaded") == [new]
    assert view.adapters("activated") == [new]
    assert view.adapters("evicted") == sorted(ids(fleet, 1))


def test_adding_an_adapter_costs_nobody_a_place(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    for number in range(HOST_PLACES):
        assert_answers_as_peft(engine, fleet, [case_of(fleet, number)])
    before = probe.look_at_one()
    assert engine.llm_engine.add_lora(lora_request(fleet, "customer-20"))
    after = probe.look_at_one()
    assert (after.slots, after.host, after.events) == (before.slots, before.host, ())
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 20)])


def test_an_added_adapter_waits_in_free_host_memory(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    assert engine.llm_engine.add_lora(lora_request(fleet, "customer-21"))
    view = probe.look_at_one()
    assert set(view.host) == ids(fleet, 21) == engine.llm_engine.list_loras()
    assert view.slots == (None,) * SLOTS
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 21)])
    assert probe.look_at_one().counts() == {"activated": 1}


def test_a_removed_adapter_leaves_slot_and_memory(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 5), case_of(fleet, 6)])
    (gone,) = ids(fleet, 5)
    assert engine.llm_engine.remove_lora(gone)
    assert not engine.llm_engine.remove_lora(gone)
    view = probe.look_at_one()
    assert set(view.host) == ids(fleet, 6)
    assert gone not in view.slots
    assert view.slots == view.model_slots
    assert_answers_as_peft(engine, fleet, [case_of(fleet, 5)])


@pytest.mark.parametrize("how", ["by-name", "by-call"])
def test_a_pinned_adapter_keeps_its_slot_while_all_others_come_and_go(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, how: str
) -> None:
    number = 30 if how == "by-name" else 31
    assert_answers_as_peft(engine, fleet, [case_of(fleet, number)])
    (pinned,) = ids(fleet, number)
    if how == "by-call":
        assert engine.llm_engine.pin_lora(pinned)
    slot = probe.look_at_one().slots.index(pinned)
    assert_answers_as_peft(engine, fleet, shuffled(fleet))
    view = probe.look_at_one()
    assert view.slots[slot] == pinned
    assert pinned not in view.adapters("evicted")
    engine.llm_engine.remove_lora(pinned)


def test_adapters_return_to_slots_whose_memory_was_lost(
    engine: "LLM", fleet: Scenario, probe: CacheProbe
) -> None:
    cases = [case_of(fleet, number) for number in range(3)]
    assert_answers_as_peft(engine, fleet, cases)
    probe.look()
    probe.lose_slots()
    assert_answers_as_peft(engine, fleet, cases)
    assert probe.look_at_one().counts() == {"activated": 3}


def test_new_files_are_read_where_the_request_says_so(
    engine: "LLM", fleet: Scenario, probe: CacheProbe, tmp_path: Path
) -> None:
    folder, old, new = tmp_path / "adapter", case_of(fleet, 1), case_of(fleet, 2)
    deployed = Scenario(fleet.base, {"deployed": folder}, ())
    shutil.copytree(fleet.adapters["customer-1"], folder)
    assert_answers_as_peft(engine, deployed, [Case("deployed", old.prompt, old.expected)])
    shutil.copytree(fleet.adapters["customer-2"], folder, dirs_exist_ok=True)
    after = Case("deployed", new.prompt, new.expected)
    request = lora_request(deployed, "deployed")
    request.load_inplace = True
    assert engine.llm_engine.add_lora(request)
    assert_answers_as_peft(engine, deployed, [after])


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


@pytest.mark.parametrize(
    ("fully_sharded", "rounds"), [(False, 2), (True, 1)], ids=["sharded", "fully-sharded"]
)
def test_two_ranks_answer_as_peft_and_decide_alike(
    fleet: Scenario, monkeypatch: pytest.MonkeyPatch, fully_sharded: bool, rounds: int
) -> None:
    # vLLM binds each rank to a NUMA node of its own; a small machine has one.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running_engine(
        fleet.base,
        max_loras=SLOTS,
        max_cpu_loras=HOST_PLACES,
        enable_prefix_caching=False,
        tensor_parallel_size=2,
        fully_sharded_loras=fully_sharded,
        disable_log_stats=False,
    ) as llm:
        probe = CacheProbe(llm)
        for seed in range(rounds):
            assert_answers_as_peft(llm, fleet, shuffled(fleet, seed))
        first, second = probe.look()
        reads, _ = llm.collective_rpc(files_read)
        metrics = llm.get_metrics()
    # One rank reports.
    assert [m.value for m in metrics if m.name == SLOTS_IN_ALL.name] == [SLOTS]
    counts = {m.labels["source"]: m.count for m in metrics if m.name == LOAD_DURATION.name}
    assert counts["disk"] == reads
    assert decisions(first) == decisions(second)
    assert first.slots == first.model_slots
    names = list(fleet.adapters)
    whole = sum(true_rank_bytes(fleet.adapters[names[lora_id - 1]]) for lora_id in first.host)
    if fully_sharded:
        # Every number is on one rank only; low ranks of A are all on the first.
        assert first.host_bytes + second.host_bytes == pytest.approx(whole, rel=0.05)
    else:
        # Half of B where columns are split and half of A where rows are; the rest is on both.
        assert first == second
        assert 0.5 * whole < first.host_bytes < 0.8 * whole


def files_read(worker: Any) -> int:
    """How often a rank has read an adapter."""
    usage = worker.model_runner.lora_manager.tiers.usage
    return sum(usage.of(lora_id).loads for lora_id in range(100))


def decisions(view: CacheView) -> tuple[object, ...]:
    """What a rank's cache has decided, whatever its part of an adapter weighs."""
    return view.slots, view.host, [(kind, adapter_id) for kind, adapter_id, _ in view.events]
