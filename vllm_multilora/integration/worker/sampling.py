"""Maps rows of encoders, embedding and output layers where vLLM's model runners do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import GREEDY_TEMPERATURE

from vllm_multilora.integration.worker import manager as worker_manager
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


def apply_sampling_constraints(
    original: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    sampling_metadata: Any,
) -> torch.Tensor:
    """Has each drafted token judged by its request's temperature, `top_k` and `top_p` on CPUs.

    VLLM's kernel there writes them to a copy, in another type, that nobody reads: a request with
    `top_k` ends the engine.
    """
    is_ours = worker_manager.is_used and logits.device.type == "cpu"
    if not is_ours or sampling_metadata.all_greedy:
        return original(logits, cu_num_draft_tokens, sampling_metadata)
    if not len(logits):  # no drafts in this step: more than vLLM can where there is `top_k`
        return logits
    counts = torch.diff(cu_num_draft_tokens, prepend=cu_num_draft_tokens.new_zeros(1))

    def of_drafts(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.repeat_interleave(counts)

    temperatures = of_drafts(sampling_metadata.temperature)
    assert temperatures is not None
    is_greedy = temperatures == GREEDY_TEMPERATURE
    logits.div_(temperatures.masked_fill(is_greedy, 1).unsqueeze(-1))
    return apply_top_k_top_p(
        logits, of_drafts(sampling_metadata.top_k), of_drafts(sampling_metadata.top_p)
    )


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
    if manager is not None and logits is not None:
        # All that vLLM asks here is which rows hold NaN. By now, a request's own parameters may
        # have made some of sound logits of float32: they act in place.
        maxima = manager.model_manager.take_row_maxima()
        logits = logits if maxima is None else maxima
        if len(logits) != len(manager.sampled_rows):
            unsound = by_request(logits.isnan().any(dim=1).int(), manager.sampled_rows)
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
