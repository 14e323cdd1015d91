"""The rows that an encoder computes belong to the adapters of their requests, in vLLM's order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_multilora.integration.worker.rows.encoder_rows import (
    first_items,
    reads_encoder,
    scheduled_items,
)


def recording(rows: int, *, has_data: bool = True) -> MultiModalFeatureSpec:
    data: Any = object() if has_data else None
    return MultiModalFeatureSpec(data, "audio", "hash", PlaceholderRange(0, rows), "hash")


def as_lists(*arrays: Any) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def test_scheduled_items_come_in_the_schedulers_order_not_in_the_batchs():
    batch = SimpleNamespace(
        request_lora_mapping=np.array([7, 0, 1 << 40]),
        req_id_to_index={"first": 0, "base": 1, "large": 2},
    )
    runner = SimpleNamespace(
        input_batch=batch,
        requests={
            name: SimpleNamespace(mm_features=[recording(rows)])
            for name, rows in (("first", 3), ("base", 4), ("large", 5))
        },
    )
    scheduled = {"large": [0], "first": [0], "base": [0]}
    assert as_lists(*scheduled_items(runner, scheduled)) == [[1 << 40, 7, 0], [5, 3, 4]]


def test_scheduled_items_without_data_are_not_encoded():
    batch = SimpleNamespace(request_lora_mapping=np.array([7]), req_id_to_index={"r": 0})
    features = [recording(3, has_data=False), recording(4)]
    runner = SimpleNamespace(
        input_batch=batch, requests={"r": SimpleNamespace(mm_features=features)}
    )
    assert as_lists(*scheduled_items(runner, {"r": [0, 1]})) == [[7], [4]]


def test_scheduled_items_of_a_step_that_encodes_nothing_are_none():
    runner = SimpleNamespace(input_batch=SimpleNamespace(), requests={})
    assert as_lists(*scheduled_items(runner, {})) == [[], []]


def test_first_items_are_those_of_requests_with_nothing_computed():
    """In the batch's order; a request that was preempted begins again."""
    states = SimpleNamespace(
        num_computed_prefill_tokens=np.array([0, 4, 0, 9]),
        index_to_req_id={0: "new", 1: "running", 2: "preempted"},
    )
    features = {"new": [recording(3)], "running": [recording(4)], "preempted": [recording(5)]}
    runner = SimpleNamespace(req_states=states, encoder_cache=SimpleNamespace(mm_features=features))
    found = first_items(runner, np.array([7, 8, 1 << 40]), np.array([2, 1, 0]))
    assert as_lists(*found) == [[7, 1 << 40], [5, 3]]


@pytest.mark.parametrize(
    ("module", "reads"),
    [
        ("model.encoder.layers.0.fc1", True),
        ("model.decoder.layers.0.encoder_attn.kv_proj", True),
        ("model.decoder.layers.0.encoder_attn.q_proj", False),
        ("model.decoder.layers.0.fc1", False),
    ],
)
def test_modules_of_the_encoder_and_of_attention_to_it_read_its_rows(module, reads):
    assert reads_encoder(module) is reads
