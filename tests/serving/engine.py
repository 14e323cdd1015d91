"""An offline vLLM engine for tests: one at a time, and gone when its block ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .cases import NEW_TOKENS, Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

MAX_LORAS = 4
MAX_CPU_LORAS = 6
BLOCK_SIZE = 32
TOP_LOGPROBS = 5

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
    "seed": 0,
    "skip_tokenizer_init": True,
}

_EXIT_LIMIT_S = 30.0


@contextmanager
def running_engine(model: Path, **overrides: Any) -> Iterator["LLM"]:
    """Runs an engine, and ends every process it started when the block is left.

    Args:
        model: Directory of the base checkpoint.
        **overrides: Arguments of ``LLM`` that replace or join this module's settings.

    Raises:
        RuntimeError: A process of the engine outlived its shutdown (and was killed).
    """
    from vllm import LLM

    before = _children()
    started: set[psutil.Process] = set()
    try:
        llm = LLM(str(model), **{**_SETTINGS, **overrides})
        try:
            yield llm
        finally:
            # Listed first: a worker whose parent has ended is no descendant of ours any more.
            started = _children() - before
            llm.llm_engine.engine_core.shutdown(timeout=_EXIT_LIMIT_S)
    finally:
        _await_exit(started | (_children() - before))


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _await_exit(processes: set[psutil.Process]) -> None:
    # multiprocessing keeps one tracker of shared resources for as long as this process lives.
    engine = [process for process in processes if not _is_resource_tracker(process)]
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


def answer(
    llm: "LLM", scenario: Scenario, cases: Sequence[Case], *, new_tokens: int = NEW_TOKENS
) -> "list[RequestOutput]":
    """Sends all cases to the engine at once and returns its outputs in the same order."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    return llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            logprobs=TOP_LOGPROBS,
            detokenize=False,
        ),
        lora_request=[
            LoRARequest(
                lora_name=case.adapter,
                lora_int_id=scenario.adapter_id(case.adapter),
                lora_path=str(scenario.adapters[case.adapter]),
            )
            if case.adapter is not None
            else None
            for case in cases
        ],
        use_tqdm=False,
    )
