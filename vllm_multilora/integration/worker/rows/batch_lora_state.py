"""What vLLM's second model runner knows of its requests' adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import proxy

import numpy as np
from vllm.config import get_current_vllm_config
from vllm.lora.layers.utils import LoRAMappingType
from vllm.v1.worker.gpu.lora_utils import LoraState

from vllm_multilora.integration.activated import ActivatedLoRARequest, start_of
from vllm_multilora.integration.patching.activation import loads_adapters
from vllm_multilora.integration.step.mapping import BatchMapping, rows_before
from vllm_multilora.integration.worker.rows.encoder_rows import first_items


class BatchLoraState(LoraState):
    """Describes a step's adapters by request, and tells them apart by number.

    vLLM's spells them out by token, collects them in a set, in which two versions of an adapter are
    one, and has 32 bits for numbers. Those of adapter directories, which servers find without
    asking each other, need more. The count by which vLLM picks a captured graph still goes by name:
    our kernels read all adapters from the plan, whatever the graph was captured with.
    """

    _runner: Any = None

    def __init__(self, max_num_reqs: int) -> None:
        super().__init__(max_num_reqs)
        self.lora_ids = self.lora_ids.astype(np.int64)

    def serve(self, runner: Any) -> None:
        """Takes the model runner that it is part of, whose manager of adapters is ours."""
        self._runner = proxy(runner)

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: Any, num_scheduled_tokens: Any
    ) -> tuple[Any, Any, Any]:
        """What `set_active_adapters` takes: a `BatchMapping`, as vLLM's tuple of all tokens."""
        if (runner := self._runner) is None:
            return super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        ids, base_rows = self.lora_ids[idx_mapping], None
        requests = [self.lora_requests.get(req_id) for req_id in req_ids]
        active = {request.lora_int_id: request for request in requests if request is not None}
        if any(isinstance(request, ActivatedLoRARequest) for request in active.values()):
            computed = runner.req_states.num_computed_prefill_tokens[idx_mapping]
            starts = np.array([start_of(request) for request in requests])
            base_rows = rows_before(starts, computed, num_scheduled_tokens)
        kind = LoRAMappingType.LANGUAGE
        mapping = BatchMapping(ids, num_scheduled_tokens, None, kind, base_rows)
        if runner.lora_manager.has_encoder:
            mapping.encoder_items = first_items(runner, ids, idx_mapping)
        return (), (mapping,), list(active.values())


def make_lora_state(original: Callable[..., LoraState], *args: Any, **kwargs: Any) -> LoraState:
    is_ours = loads_adapters(get_current_vllm_config())
    return BatchLoraState(*args, **kwargs) if is_ours else original(*args, **kwargs)
