"""Whose images and sounds the encoders of a step look at, where adapters act in encoders.

vLLM calls an encoder a tower, and what follows it, up to the language model, a connector. They take
a step's items in groups, one after the other, and each group begins at their first row. In models
with an encoder and a decoder, such as Whisper, vLLM knows no towers, and takes the encoder's rows
for the decoder's.
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
        requests: The adapters of the step, by number.
        ids: The numbers of requests' adapters, by the requests' ids; 0 for none.

    Attributes:
        ids: As given.
    """

    def __init__(
        self,
        manager: MultiLoRAWorkerManager,
        model: Any,
        requests: Mapping[int, Any],
        ids: Mapping[str, int],
    ) -> None:
        self._manager, self._model, self._requests, self.ids = manager, model, requests, ids
        self._all: list[_Item] = []
        self._items: defaultdict[str, deque[_Item]] = defaultdict(deque)
        self._group: deque[_Item] | None = None

    def expect(self, items: Iterable[_Item]) -> None:
        """Learns what groups will be made of, in its order within each kind."""
        self._all = list(items)
        self._items.clear()
        for item in self._all:
            self._items[item.modality].append(item)

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
        if self._all and self._manager.model_manager.encoder_wrapper is not None:
            self._map(self._all)  # a decoder's attention reads all of them

    def _map(self, items: Sequence[_Item]) -> None:
        ids = np.array([item.lora_id for item in items], dtype=np.int64)
        active = [self._requests[number] for number in sorted(set(ids.tolist()) - {0})]
        counts = [self._rows(item) for item in items]
        kinds = LoRAMappingType.TOWER, LoRAMappingType.CONNECTOR
        for kind, tokens in zip(kinds, zip(*counts, strict=True), strict=True):
            if None not in tokens:
                mapping = BatchMapping(ids, np.array(tokens, dtype=np.int64), None, kind)
                self._manager.set_active_adapters(active, mapping)

    def _rows(self, item: _Item) -> tuple[int, int | None]:
        """How many an item has in the tower, and in the connector if there is one."""
        handed_on = item.position.get_num_embeds()
        if self._manager.model_manager.encoder_wrapper is not None:
            return handed_on, None
        tower, connector = self._model.get_mm_lora_token_counts(
            modality=item.modality, mm_kwargs=item.data, num_mm_embeds=handed_on
        )
        return tower, connector if self._model.get_mm_mapping().connector else None


_STEP: ContextVar[_EncoderStep | None] = ContextVar("multilora_encoder_step", default=None)


def grouped_items(
    original: Callable[..., Iterator[tuple[str, int, Any]]], *args: Any, **kwargs: Any
) -> Iterator[tuple[str, int, Any]]:
    found = original(*args, **kwargs)
    step = _STEP.get()
    return found if step is None else step.groups(found)


def execute_mm_encoder(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    manager = manager_of(runner)
    if manager is None or not _acts_in_encoders(manager):
        return original(runner, scheduler_output)
    _, found, owners = runner._batch_mm_inputs_from_scheduler(scheduler_output)
    batch = runner.input_batch
    ids = {name: int(batch.request_lora_mapping[batch.req_id_to_index[name]]) for name, _ in owners}
    step = _EncoderStep(manager, runner.model, batch.lora_id_to_lora_request, ids)
    step.expect(
        _Item(ids[name], modality, data, position)
        for (name, position), (modality, data) in zip(owners, found, strict=True)
    )
    token = _STEP.set(step)
    try:
        with _mapped_here(manager):
            return original(runner, scheduler_output)
    finally:
        _STEP.reset(token)


def _acts_in_encoders(manager: MultiLoRAWorkerManager) -> bool:
    is_decoders = manager.model_manager.encoder_wrapper is not None
    return is_decoders or manager.supports_tower_connector_lora()


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
    if encoder_cache is None or not _acts_in_encoders(lora_manager):
        return
    names = [name for name in scheduled_encoder_inputs if name in req_id_to_index]
    ids = {name: int(lora_state.lora_ids[req_id_to_index[name]]) for name in names}
    requests = {ids[name]: lora_state.lora_requests[name] for name in names if ids[name]}
    _STEP.set(_EncoderStep(lora_manager, model, requests, ids))


def prepare_mm_inputs(
    original: Callable[..., Any], runner: Any, scheduled_encoder_inputs: Mapping[str, Sequence[int]]
) -> Any:
    step = _STEP.get()
    if step is not None:
        cache = runner.encoder_cache
        features = [
            (name, cache.mm_features[name][number])
            for name, numbers in scheduled_encoder_inputs.items()
            for number in numbers
            if name in step.ids
        ]
        step.expect(
            _Item(step.ids[name], feature.modality, feature.data, feature.mm_position)
            for name, feature in features
            if feature.data is not None and feature.identifier not in cache.encoder_outputs
        )
    return original(runner, scheduled_encoder_inputs)
