"""Whose images and sounds the encoders of a step look at, where adapters act in encoders.

vLLM calls an encoder a tower, and what follows it, up to the language model, a connector. They take
a step's items in groups, one after the other, and each group begins at their first row.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from vllm.lora.layers.utils import LoRAMappingType

from vllm_multilora.integration.step.mapping import BatchMapping
from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager, manager_of


class _Item(NamedTuple):
    """An image or the like.

    Attributes:
        lora_id: Of the request's adapter; 0 for none.
        modality: Its kind.
        data: What the encoder gets.
        position: Where the language model has its embeddings.
    """

    lora_id: int
    modality: str
    data: Any
    position: Any


class _EncoderStep:
    """The items that a step's encoders look at, and whose they are.

    Args:
        manager: The worker's.
        model: The model.
        items: In their order within each kind.
        requests: The adapters of the step, by number.
    """

    def __init__(
        self,
        manager: MultiLoRAWorkerManager,
        model: Any,
        items: Iterable[_Item],
        requests: Mapping[int, Any],
    ) -> None:
        self._manager, self._model, self._requests = manager, model, requests
        self._items: defaultdict[str, deque[_Item]] = defaultdict(deque)
        for item in items:
            self._items[item.modality].append(item)
        self._group: deque[_Item] | None = None

    def groups(self, found: Iterable[tuple[str, int, Any]]) -> Iterator[tuple[str, int, Any]]:
        """Hands vLLM's groups on, each when towers and connectors know whose rows it has.

        Args:
            found: Of each group its kind, how many items it has, and what the encoder gets.
        """
        if self._group is not None:  # some models' videos, one by one of a group
            for modality, count, data in found:
                self._map([self._group.popleft() for _ in range(count)])
                yield modality, count, data
            return
        for modality, count, data in found:
            self._group = deque(self._items[modality].popleft() for _ in range(count))
            self._map(self._group)
            yield modality, count, data
        self._group = None

    def _map(self, items: Sequence[_Item]) -> None:
        ids = np.array([item.lora_id for item in items], dtype=np.int64)
        active = [self._requests[number] for number in sorted(set(ids.tolist()) - {0})]
        counts = [
            self._model.get_mm_lora_token_counts(
                modality=item.modality,
                mm_kwargs=item.data,
                num_mm_embeds=item.position.get_num_embeds(),
            )
            for item in items
        ]
        kinds = [LoRAMappingType.TOWER]
        if self._model.get_mm_mapping().connector:
            kinds.append(LoRAMappingType.CONNECTOR)
        for kind, tokens in zip(kinds, zip(*counts, strict=True), strict=False):
            if None not in tokens:
                mapping = BatchMapping(ids, np.array(tokens, dtype=np.int64), None, kind)
                self._manager.set_active_adapters(active, mapping)


_STEP: ContextVar[_EncoderStep | None] = ContextVar("multilora_encoder_step", default=None)


def grouped_items(
    original: Callable[..., Iterator[tuple[str, int, Any]]], *args: Any, **kwargs: Any
) -> Iterator[tuple[str, int, Any]]:
    found = original(*args, **kwargs)
    step = _STEP.get()
    return found if step is None else step.groups(found)


def execute_mm_encoder(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    manager = manager_of(runner)
    if manager is None or not manager.supports_tower_connector_lora():
        return original(runner, scheduler_output)
    _, found, owners = runner._batch_mm_inputs_from_scheduler(scheduler_output)
    batch = runner.input_batch
    ids = [int(batch.request_lora_mapping[batch.req_id_to_index[owner]]) for owner, _ in owners]
    items = [
        _Item(lora_id, modality, data, position)
        for lora_id, (modality, data), (_, position) in zip(ids, found, owners, strict=True)
    ]
    step = _EncoderStep(manager, runner.model, items, batch.lora_id_to_lora_request)
    token = _STEP.set(step)
    try:
        with _mapped_here(manager):
            return original(runner, scheduler_output)
    finally:
        _STEP.reset(token)


@contextmanager
def _mapped_here(manager: MultiLoRAWorkerManager) -> Iterator[None]:
    """Within it, vLLM does not map encoders' rows itself."""
    own: Any = manager
    own.supports_tower_connector_lora = lambda: False
    try:
        yield
    finally:
        del own.supports_tower_connector_lora  # that of its class again


def set_active_mm_loras(
    original: Callable[..., None],
    model: Any,
    lora_manager: Any,
    encoder_cache: Any,
    req_id_to_index: Mapping[str, int],
    lora_state: Any,
    scheduled_encoder_inputs: Mapping[str, Sequence[int]],
) -> None:
    _STEP.set(None)
    if not isinstance(lora_manager, MultiLoRAWorkerManager):
        original(
            model,
            lora_manager,
            encoder_cache,
            req_id_to_index,
            lora_state,
            scheduled_encoder_inputs,
        )
        return
    if encoder_cache is None or not lora_manager.supports_tower_connector_lora():
        return
    items: list[_Item] = []
    requests: dict[int, Any] = {}
    for name, numbers in scheduled_encoder_inputs.items():
        if (index := req_id_to_index.get(name)) is None:
            continue
        lora_id = int(lora_state.lora_ids[index])
        if lora_id:
            requests[lora_id] = lora_state.lora_requests[name]
        for feature in (encoder_cache.mm_features[name][number] for number in numbers):
            if feature.data is not None and feature.identifier not in encoder_cache.encoder_outputs:
                items.append(_Item(lora_id, feature.modality, feature.data, feature.mm_position))
    _STEP.set(_EncoderStep(lora_manager, model, items, requests))
