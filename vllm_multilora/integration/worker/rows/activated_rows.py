"""Which rows of a step an activated adapter is not active on, in vLLM's first model runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_multilora.integration.activated import ActivatedLoRARequest, start_of
from vllm_multilora.integration.step.mapping import rows_before


def base_rows_of(
    requests: Mapping[str, Any], input_batch: Any, tokens: npt.NDArray[np.integer]
) -> npt.NDArray[np.integer] | None:
    """`BatchMapping.base_rows` of a step.

    Looks at requests in turn only while some of them have activated adapters, and then only at
    those whose prompts are not computed yet: generated tokens are the adapter's.

    Args:
        requests: The runner's states of its requests, by id.
        input_batch: The runner's batch.
        tokens: [requests], tokens of each request in the step.
    """
    adapters = input_batch.lora_id_to_lora_request.values()
    if not any(isinstance(lora, ActivatedLoRARequest) for lora in adapters):
        return None
    count = len(tokens)
    computed = input_batch.num_computed_tokens_cpu[:count]
    starts = np.zeros(count, np.int64)
    for index in np.flatnonzero(computed < input_batch.num_prompt_tokens[:count]).tolist():
        starts[index] = start_of(requests[input_batch.req_ids[index]].lora_request)
    return rows_before(starts, computed, tokens)
