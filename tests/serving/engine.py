"""An offline vLLM engine for tests: one at a time, and gone when its block ends."""

import gc
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from vllm_multilora.integration.patching.version import installed_version, minor_of
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

from . import template
from .models.cases import NEW_TOKENS, Case, Scenario

if TYPE_CHECKING:
    import torch
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_LORAS = 4
MAX_CPU_LORAS = 6
BLOCK_SIZE = 32
TOP_LOGPROBS = 5
KV_CACHE_BYTES = 64 << 20
"""KV cache of a worker, kept small: it is written to at the start, which costs new memory."""

_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""In GiB. Where it is set, vLLM does not ask what an engine has been told."""

_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_lora": True,
    "max_loras": MAX_LORAS,
    "max_cpu_loras": MAX_CPU_LORAS,
    "max_lora_rank": 64,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "seed": 0,
    "skip_tokenizer_init": True,
}

_EXIT_LIMIT_S = 30.0

_MINOR = minor_of(installed_version()) or (0, 99)

SCALE_OUT = () if _MINOR < (0, 30) else ("--enable-scale-out",)
"""The flag that adds vLLM's routes for tokens, which 0.29 has without it."""

BEFORE_0_31, BEFORE_0_32 = _MINOR < (0, 31), _MINOR < (0, 32)
"""Whether vLLM is older than 0.31, and than 0.32."""

IS_0_33 = _MINOR == (0, 33)
"""Whether vLLM is 0.33."""

_HAS_SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

refused_by_second_runner_of_0_29 = pytest.mark.skipif(
    _MINOR < (0, 30) and _HAS_SECOND_RUNNER,
    reason="vLLM 0.29's second model runner refuses it",
)

TAKES_LOGITS_PROCESSORS = _MINOR >= (0, 31) or not _HAS_SECOND_RUNNER
"""The second model runner refuses users' own before vLLM 0.31."""

needs_drafts = pytest.mark.skipif(
    _MINOR == (0, 30) and not _HAS_SECOND_RUNNER,
    reason="vLLM 0.30's first model runner ends with the first draft on CPUs",
)

needs_draft_models = pytest.mark.skipif(
    BEFORE_0_31 and _HAS_SECOND_RUNNER,
    reason="vLLM's second model runner refuses draft models before 0.31",
)

needs_ngram_drafts = pytest.mark.skipif(
    BEFORE_0_32 and _HAS_SECOND_RUNNER,
    reason="vLLM's second model runner refuses drafts by n-grams before 0.32",
)


@contextmanager
def running_engine(model: Path, *, in_process: bool = False, **overrides: Any) -> Iterator["LLM"]:
    """Runs an engine, and ends every process it started when the block is left.

    Its store is its own, unless the environment names a folder of stores.

    Args:
        model: Directory of the base checkpoint.
        in_process: Whether scheduler and worker run in this process: it starts in half the time,
            and does one step for each that it is asked to do.
        **overrides: Arguments of ``LLM`` that replace or join this module's settings.

    Raises:
        RuntimeError: A process of the engine outlived its shutdown (and was killed).
    """
    import torch
    import zmq
    from vllm import LLM

    if BEFORE_0_32:
        # Collected, a context of its clients may wait for ever for what nobody takes any more.
        zmq.Context.__del__ = lambda context: None
    before = _children()
    started: set[psutil.Process] = set()
    with ExitStack() as stack, store_folder() as folder, pytest.MonkeyPatch.context() as life:
        life.setenv(FOLDER_VARIABLE, folder)  # an engine in this process looks for it late
        life.delenv(_KV_CACHE_VARIABLE, raising=False)
        if in_process:
            # vLLM collects garbage time and again: it looks at what is new, and so its own, alone.
            gc.collect()  # the last engine
            gc.freeze()
            life.setattr(gc, "freeze", lambda: None)
            life.setattr(gc, "unfreeze", lambda: None)
            # A worker of vLLM chooses how many threads there are, and makes this do nothing.
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            life.setattr(torch, "set_num_threads", torch.set_num_threads)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if in_process:
                    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                    # vLLM looks at the attributes of all modules, and fails on those of this one,
                    # which an earlier engine has brought that drafts tokens by n-grams.
                    patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
                else:
                    stack.enter_context(template.forked_processes())
                llm = LLM(str(model), **{**_SETTINGS, **overrides})
            try:
                yield llm
            finally:
                # Listed first: a worker whose parent has ended is no descendant of ours any more.
                started = _children() - before
                llm.llm_engine.engine_core.shutdown(timeout=_EXIT_LIMIT_S)
        finally:
            _await_exit(started | (_children() - before))


@contextmanager
def running_async_engine(model: Path, **more: Any) -> "Iterator[AsyncLLM]":
    """Runs an `AsyncLLM` with a store of its own until the block is left.

    Args:
        model: Directory of the base checkpoint.
        **more: Arguments of `AsyncEngineArgs` beside this function's.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=64,
        max_model_len=128,
        skip_tokenizer_init=True,
        **{"kv_cache_memory_bytes": KV_CACHE_BYTES, **more},
    )
    with (
        store_folder() as folder,
        template.forked_processes(),
        pytest.MonkeyPatch.context() as life,
    ):
        life.setenv(FOLDER_VARIABLE, folder)
        running = AsyncLLM.from_engine_args(arguments)
        try:
            yield running
        finally:
            running.shutdown(timeout=_EXIT_LIMIT_S)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, and more, for an engine with a given size of KV cache."""
    kept = {name: value for name, value in os.environ.items() if name != _KV_CACHE_VARIABLE}
    return {**kept, **more}


@contextmanager
def store_folder() -> Iterator[str]:
    """A folder for a store of one's own; the one that the environment names, if it does."""
    if FOLDER_VARIABLE in os.environ:
        yield os.environ[FOLDER_VARIABLE]
        return
    # Not below pytest's folders: the path of a socket must be short.
    with tempfile.TemporaryDirectory(
        prefix="multilora-store-", ignore_cleanup_errors=True
    ) as folder:
        yield folder


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _await_exit(processes: set[psutil.Process]) -> None:
    # For as long as this process lives, there are multiprocessing's tracker of shared resources and
    # the template.
    engine = [
        process
        for process in processes
        if not _is_resource_tracker(process) and not template.is_first(process.pid)
    ]
    _, alive = psutil.wait_procs(engine, timeout=_EXIT_LIMIT_S)
    for process in alive:
        process.kill()
    if alive:
        raise RuntimeError(f"engine processes outlived their shutdown: {alive}")


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def lora_request(scenario: Scenario, name: str) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, scenario.adapter_id(name), str(scenario.adapters[name]))


def loras_of(scenario: Scenario, cases: Iterable[Case]) -> "list[LoRARequest | None]":
    """What asks for the adapter of each case; None for the base model."""
    return [lora_request(scenario, case.adapter) if case.adapter else None for case in cases]


def greedy(**options: Any) -> "SamplingParams":
    """What asks for the likeliest tokens, as PEFT has found them, without their text."""
    from vllm import SamplingParams

    settings = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{"temperature": 0.0, **settings, **options})


def generate(
    llm: "LLM",
    prompts: Iterable[Sequence[int]],
    loras: "Iterable[LoRARequest | None]",
    **options: Any,
) -> "list[RequestOutput]":
    """Sends all prompts to the engine at once and returns its outputs in the same order.

    Args:
        llm: The engine.
        prompts: Token ids.
        loras: The adapter of each prompt.
        **options: As for `greedy`.
    """
    return llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        greedy(**options),
        lora_request=list(loras),
        use_tqdm=False,
    )


def prompt_logprobs(output: "RequestOutput") -> "torch.Tensor":
    """As `PeftReference.prompt_logprobs`, of a request with `prompt_logprobs`."""
    import torch

    assert output.prompt_logprobs is not None
    assert output.prompt_token_ids is not None
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return torch.tensor([scored[token].logprob for scored, token in pairs])


def answer(
    llm: "LLM", scenario: Scenario, cases: Sequence[Case], *, new_tokens: int = NEW_TOKENS
) -> "list[RequestOutput]":
    """As `generate`, of cases."""
    prompts, loras = [case.prompt for case in cases], loras_of(scenario, cases)
    return generate(llm, prompts, loras, max_tokens=new_tokens, logprobs=TOP_LOGPROBS)


def assert_as_peft(outputs: "Sequence[RequestOutput]", cases: Sequence[Case]) -> None:
    """Each answer has PEFT's tokens."""
    wrong = [
        (case.adapter, output.outputs[0].token_ids, output.outputs[0].stop_reason)
        for output, case in zip(outputs, cases, strict=True)
        if tuple(output.outputs[0].token_ids) != case.expected.tokens
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} answers are wrong: {wrong}"


def assert_others_as_peft(
    outputs: "Sequence[RequestOutput]", cases: Sequence[Case], failing: Collection[str]
) -> None:
    """Requests for failing adapters have ended with an error; all others have PEFT's tokens."""
    answers = list(zip(outputs, cases, strict=True))
    bad = [output for output, case in answers if case.adapter in failing]
    good = [(output, case) for output, case in answers if case.adapter not in failing]
    assert {output.outputs[0].finish_reason for output in bad} == {"error"}
    assert_as_peft(*zip(*good, strict=True))
