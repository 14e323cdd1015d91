"""vLLM's own scheduler, ours over it, without an engine: the test is the worker.

No adapters are attached, so requests for them are ready at once.
"""

import itertools
import json
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    LoRAConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_multilora.integration.engine.executor import scheduler_over
from vllm_multilora.integration.engine.requests.tenant_wall import SEAL
from vllm_multilora.integration.seals import Seal

BLOCK_SIZE = 16
TOKEN_BYTES = 8
"""Bytes of a token in the KV cache."""
SCHEDULERS = (Scheduler, AsyncScheduler)

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def make_config(folder: Path, *, places: int, step_tokens: int, **settings: Any) -> VllmConfig:
    """An engine's configuration.

    Args:
        folder: Gets the model's `config.json`.
        places: `--max-num-seqs`.
        step_tokens: `--max-num-batched-tokens`.
        **settings: Of the plugin; `policy` is vLLM's `--scheduling-policy`, `chunked` its chunked
            prefill, `prefix_caching` its prefix cache, `drafts` how many tokens are drafted at a
            time, and `max_loras` what it says.
    """
    (folder / "config.json").write_text(json.dumps(_MODEL))
    chunked, max_loras = settings.pop("chunked", True), settings.pop("max_loras", 8)
    drafts = settings.pop("drafts", 0)
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=2048
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=places,
            max_num_batched_tokens=step_tokens,
            max_model_len=2048 if chunked else step_tokens,
            enable_chunked_prefill=chunked,
            is_encoder_decoder=False,
            policy=settings.pop("policy", "fcfs"),
        ),
        cache_config=CacheConfig(
            block_size=BLOCK_SIZE, enable_prefix_caching=settings.pop("prefix_caching", False)
        ),
        lora_config=LoRAConfig(max_loras=max_loras, max_lora_rank=8, max_cpu_loras=8),
        additional_config={"multilora": settings},
    )
    if drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=drafts,
            prompt_lookup_max=3,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
    return config


class Steps:
    """A scheduler whose steps the test takes.

    Args:
        config: Of the engine.
        base: vLLM's scheduler class.
        blocks: Of the KV cache.

    Attributes:
        finished: The requests that have ended, in that order.
        leaves_a_place: Whether the last step had a place in the batch, and a request waited on.
    """

    def __init__(self, config: VllmConfig, base: type = Scheduler, blocks: int = 10_000) -> None:
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = scheduler_over(base, config)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=False,
        )
        # An asynchronous scheduler schedules a step while the one before is computed.
        self._ahead = int(issubclass(base, AsyncScheduler))
        self._under_way: deque[tuple[Any, dict[str, bool]]] = deque()
        self._numbers = itertools.count()
        self.finished: list[str] = []
        self.leaves_a_place = False

    def ask(
        self,
        name: str,
        *,
        adapter: int | None = None,
        tenant: str | None = None,
        weight: float = 1.0,
        prompt: int = 16,
        generate: int = 4,
        first_token: int | None = None,
        inplace: bool = False,
        grammar: Future[Any] | None = None,
        **options: Any,
    ) -> Request:
        """Adds a request; its prompt is one of its own, unless its first token is said.

        It waits for its grammar, where it has one.
        """
        number = next(self._numbers)
        first = number * 31 if first_token is None else first_token
        lora = None
        if adapter is not None:
            lora = LoRARequest(f"adapter-{adapter}", adapter, "/nowhere", load_inplace=inplace)
        request = Request(
            name,
            [(first + i) % 300 for i in range(prompt)],
            SamplingParams(
                max_tokens=generate,
                ignore_eos=True,
                structured_outputs=grammar and StructuredOutputsParams(regex="a"),
            ),
            None,
            lora_request=lora,
            arrival_time=float(number),
            **options,
        )
        if tenant is not None:
            SEAL.set(request, Seal(tenant, weight))
        if grammar is not None:
            request.structured_output_request.grammar = grammar
        self.scheduler.add_request(request)
        return request

    def step(self) -> dict[str, int]:
        """One step, scheduled and computed; how many tokens of each request were in it."""
        scheduled = self.schedule()
        scheduler = self.scheduler
        self.leaves_a_place = bool(scheduler.waiting) and (
            len(scheduler.running) < scheduler.max_num_running_reqs
        )
        while len(self._under_way) > self._ahead:
            self.compute()
        return scheduled

    def schedule(self) -> dict[str, int]:
        output = self.scheduler.schedule()
        self._under_way.append(
            (output, {n: self.scheduler.requests[n].is_prefill_chunk for n in _names(output)})
        )
        return dict(output.num_scheduled_tokens)

    def compute(self) -> None:
        """The oldest step under way has its results; of what was drafted, half was right."""
        output, is_part = self._under_way.popleft()
        before = set(self.scheduler.requests)
        names, drafted = _names(output), output.scheduled_spec_decode_tokens
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[
                    [] if is_part[name] else [7] * (1 + len(drafted.get(name, ())) // 2)
                    for name in names
                ],
            ),
        )
        # An asynchronous scheduler has taken it that there will be as many as there can be.
        if (drafts := self.scheduler.num_spec_tokens) and not self._ahead:
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[7] * drafts] * len(names)))
        self.finished += sorted(before - set(self.scheduler.requests))

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def drain(self, limit: int = 2000) -> list[str]:
        """Steps until all requests have ended; returns them in that order."""
        for _ in range(limit):
            if not self.scheduler.requests:
                return self.finished
            self.step()
        raise AssertionError(f"{list(self.scheduler.requests)} have not ended")


def _names(output: Any) -> list[str]:
    return list(output.num_scheduled_tokens)
