"""Maps the rows of an encoder to adapters, in models with encoder and decoder such as Whisper.

vLLM maps the decoder's rows alone. The encoder computes the items (recordings, say) of all requests
that begin in a step as one batch, and each request has its item before its first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

ENCODER = "encoder"
"""Name of the encoder's wrapper in `punica_wrapper_mapping`."""


def encoder_rows(vllm_config: VllmConfig) -> int:
    """Maximum rows of an encoder in a step."""
    return MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY).get_encoder_budget()


def reads_encoder(module: str) -> bool:
    """Whether a module computes the encoder's rows: in it, or in the attention to its output."""
    return ".encoder." in f".{module}." or module.endswith(".encoder_attn.kv_proj")


def scheduled_items(
    runner: Any, scheduled: Mapping[str, Sequence[int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The items that vLLM's first model runner encodes in a step, in its order.

    Args:
        runner: The model runner.
        scheduled: The numbers of requests' items, by request id, as the scheduler has sent them.

    Returns:
        int64 [items] twice: the adapter of each item's request, 0 for none, and its rows.
    """
    batch = runner.input_batch
    found = [
        (batch.request_lora_mapping[batch.req_id_to_index[name]], _rows(feature))
        for name, numbers in scheduled.items()
        for feature in (runner.requests[name].mm_features[number] for number in numbers)
        if feature.data is not None
    ]
    ids, rows = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return ids, rows


def first_items(
    runner: Any, ids: npt.NDArray[np.integer], states: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    """The items that vLLM's second model runner encodes in a step, in its order.

    They are those of the requests of which no token has been computed: vLLM schedules a request's
    item with its first tokens, also when it begins again after a preemption.

    Args:
        runner: The model runner.
        ids: int64 [requests], the adapter of each request of the step, 0 for none.
        states: [requests], where the runner keeps each request's state.

    Returns:
        As `scheduled_items`.
    """
    begins = runner.req_states.num_computed_prefill_tokens[states] == 0
    names = map(runner.req_states.index_to_req_id.__getitem__, states[begins].tolist())
    features = runner.encoder_cache.mm_features
    rows = [sum(map(_rows, features[name])) for name in names]
    return ids[begins], np.array(rows, dtype=np.int64)


def _rows(feature: Any) -> int:
    return feature.mm_position.get_num_embeds()
