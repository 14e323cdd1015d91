"""Maps rows of encoders, embedding and output layers where vLLM's model runners do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.sample import rejection_sampler

from vllm_multilora.integration.worker.manager import manager_of
from vllm_multilora.integration.worker.rows.encoder_rows import scheduled_items


def preprocess(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    manager = manager_of(runner)
    if manager is not None and manager.has_encoder:
        scheduled = scheduler_output.scheduled_encoder_inputs
        manager.map_encoder(*scheduled_items(runner, scheduled))
    # In a model that sees, the embedding has a row for each token, whatever becomes of it.
    if manager is None or not runner.input_batch.req_prompt_embeds or runner.supports_mm_inputs:
        return original(runner, scheduler_output, *args, **kwargs)
    *starts, end = runner.query_start_loc.np[: runner.input_batch.num_reqs + 1].tolist()
    embedded = np.add.reduceat(runner.is_token_ids.np[:end], starts, dtype=np.int64)
    with manager.model_manager.rows_to_embed(embedded):
        return original(runner, scheduler_output, *args, **kwargs)


def sample(
    original: Callable[..., Any],
    runner: Any,
    hidden_states: Any,
    input_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    manager = manager_of(runner)
    if manager is None:
        return original(runner, hidden_states, input_batch, *args, **kwargs)
    rows = np.diff(input_batch.cu_num_logits_np)
    manager.model_manager.set_sampled_rows(rows)
    output, *rest = original(runner, hidden_states, input_batch, *args, **kwargs)
    if output.num_nans is not None and len(output.num_nans) != len(rows):
        output = replace(output, num_nans=by_request(output.num_nans, rows))
    return output, *rest


def sample_rows(
    original: Callable[..., Any],
    runner: Any,
    logits: torch.Tensor | None,
    drafts: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    manager = manager_of(runner)
    if manager is not None and logits is not None:
        # NaN if any of the row is: found sooner than NaN is counted among all tokens.
        manager.row_maxima = logits.amax(dim=-1, keepdim=True)
        if logits.device.type == "cpu":
            manager.idle_generators = _take_idle_generators(runner)
    if manager is None or drafts is None:
        return original(runner, logits, drafts, *args, **kwargs)
    if not drafts.max_spec_len:
        # To compare no drafts at all is more than vLLM can on CPUs where a request has `top_k`.
        return original(runner, logits, None, *args, **kwargs)
    with _expansion_on_cpus(logits):
        return original(runner, logits, drafts, *args, **kwargs)


@contextmanager
def _expansion_on_cpus(logits: torch.Tensor | None) -> Iterator[None]:
    """Has each drafted token get its request's temperature, `top_k` and `top_p` on CPUs.

    VLLM's kernel there writes them to a copy, in another type, that nobody reads: a request with
    `top_k` ends the engine.
    """
    if logits is None or logits.device.type != "cpu":
        yield
        return
    before = rejection_sampler.expand_batch_to_tokens
    rejection_sampler.expand_batch_to_tokens = _expanded
    try:
        yield
    finally:
        rejection_sampler.expand_batch_to_tokens = before


def _expanded(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """As vLLM's function: for each token the value of its request."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill_(expanded == replace_from, replace_to)


def _take_idle_generators(runner: Any) -> dict[int, torch.Generator]:
    """Takes the generators out of the batch whose requests are amidst their prompts, by row.

    vLLM draws tokens with them, which it throws away, and then turns them back, which generators of
    CPUs do not allow.
    """
    generators = runner.input_batch.generators
    if not generators:
        return {}
    is_amidst = runner.discard_request_mask.np
    return {row: generators.pop(row) for row in list(generators) if is_amidst[row]}


def bookkeeping_sync(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    sampler_output: Any,
    logits: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    manager = manager_of(runner)
    if manager is not None and manager.row_maxima is not None:
        # All that vLLM asks here is which rows hold NaN. By now, a request's own parameters may
        # have made some of sound logits of float32: they act in place.
        logits, manager.row_maxima = manager.row_maxima, None
        if len(logits) != len(manager.sampled_rows):
            unsound = by_request(logits.isnan().squeeze(1).int(), manager.sampled_rows)
            logits = torch.where(unsound > 0, math.nan, 0.0).unsqueeze(1)
    answer = original(runner, scheduler_output, sampler_output, logits, *args, **kwargs)
    if manager is not None and manager.idle_generators:
        runner.input_batch.generators.update(manager.idle_generators)
        manager.idle_generators = {}
    return answer


def by_request(counts: torch.Tensor, rows: npt.NDArray[np.integer]) -> torch.Tensor:
    """Adds up counts of rows by request.

    Args:
        counts: [rows of all requests], request after request.
        rows: [requests], how many rows each has.

    Returns:
        [requests], of the type of `counts`; nothing waits for the device.
    """
    request = torch.from_numpy(np.arange(len(rows)).repeat(rows))
    if counts.device.type != "cpu":
        request = request.pin_memory().to(counts.device, non_blocking=True)
    return counts.new_zeros(len(rows)).index_add_(0, request, counts[: len(request)])
