"""Slots, totals and what they are worth in KV cache."""

import pytest

from tests.adapters.checkpoints import MODULES
from vllm_multilora.integration.offline.base_model import LayerMemory, SlotMemory
from vllm_multilora.slots.budget import readable
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan

from .models import HEAD_WIDTHS, MODEL, TWO_WORKERS

WIDTHS = sum(inputs + outputs for _, inputs, outputs in MODULES) + HEAD_WIDTHS


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("count", [1, 5])
def test_slots_add_up(rank, count):
    assert MODEL.by_rank[rank].total(count) == 8 + count * (48 + 2 * rank * WIDTHS)


def test_numbered_layers_are_shown_together_but_only_if_they_are_alike():
    def layer(number, size):
        return LayerMemory(f"model.layers.{number}.mlp.up", (), size)

    memory = SlotMemory((layer(0, 10), layer(10, 10), layer(2, 30)), (), 0)
    found = [*memory.groups()]
    assert found == [("model.layers.*.mlp.up", 2, 20), ("model.layers.*.mlp.up", 1, 30)]


def test_an_experts_number_is_one_too_and_a_name_with_digits_is_none():
    layers = tuple(LayerMemory(f"h.{i}.experts.{i}.w1", (), 1) for i in range(3))
    assert [name for name, *_ in SlotMemory(layers, (), 0).groups()] == ["h.*.experts.*.w1"]


def test_every_worker_keeps_its_own_host_copies():
    assert MemoryPlan(MODEL, 3, 16).host_least == 3 * 16_000
    assert MemoryPlan(TWO_WORKERS, 3, 16).host_least == 2 * 3 * 16_000


@pytest.mark.parametrize(
    ("size", "text"),
    [(83_886_080, "80.0 MiB"), (1_477_705_728, "1.38 GiB"), (2048, "2.0 KiB"), (0, "0.0 KiB")],
)
def test_sizes_are_readable(size, text):
    assert readable(size) == text
