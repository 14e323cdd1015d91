"""Time to the first token over a context that another adapter's request has computed already.

A small random Llama with adapters of equal size, activated ones (aLoRA) and plain ones, that take
turns over one context, each with a tail of its own. Each asks for one token, alone. The first of a
round computes the context; activated ones that come after it find it in the prefix cache, plain
ones do not. Printed are medians of those that come after, and their ratio: that is what counts,
the times are this machine's. Needs `peft`.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark

INVOCATION = (1000, 1001)
WORDS = 1000
TAIL = 16


def write_base(path: Path, positions: int) -> None:
    """A Llama of 8 layers and a hidden size of 512, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_adapter(base: Path, path: Path, invocation: tuple[int, ...]) -> None:
    """An adapter of rank 16 on all linear layers, with random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        target_modules="all-linear",
        init_lora_weights=False,
        alora_invocation_tokens=list(invocation) or None,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(path)


def first_token_s(llm: Any, prompt: list[int], lora: Any) -> tuple[float, int]:
    """Seconds until a request that is alone has its first token; and its cached tokens."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    (output,) = llm.generate(
        {"prompt_token_ids": prompt}, params, lora_request=lora, use_tqdm=False
    )
    return time.perf_counter() - begin, output.num_cached_tokens


@benchmark(
    workload="a small random Llama; adapters that take turns over one context",
    control="plain adapters over the same contexts",
    figure="time to the first token of plain adapters over that of activated ones",
    compares_to="1, where nothing is shared",
    quick={"context": 256, "adapters": 2, "rounds": 1},
)
def shared_context(context: int = 2000, adapters: int = 6, rounds: int = 3) -> Iterable[Figure]:
    """Time to the first token over a context that another adapter's request has computed already.

    Args:
        context: Its tokens.
        adapters: Of each kind.
        rounds: Contexts.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    source, length = random.Random(0), context + len(INVOCATION) + TAIL + 1
    kinds = {"activated": INVOCATION, "plain": ()}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        write_base(base, length)
        loras: dict[str, list[Any]] = {kind: [] for kind in kinds}
        for number in range(1, adapters * len(kinds) + 1):
            kind = list(kinds)[number % len(kinds)]
            path = Path(folder, f"{kind}-{number}")
            write_adapter(base, path, kinds[kind])
            loras[kind].append(LoRARequest(path.name, number, str(path)))
        llm = LLM(
            str(base),
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=adapters * len(kinds),
            max_model_len=length,
            seed=0,
            disable_log_stats=False,  # else cached tokens are not told
        )

        def words(count: int) -> list[int]:
            return [source.randrange(WORDS) for _ in range(count)]

        for lora in (*loras["activated"], *loras["plain"]):  # into their slots
            first_token_s(llm, [*words(TAIL), *INVOCATION], lora)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        cached: dict[str, set[int]] = {kind: set() for kind in kinds}
        for _ in range(rounds):
            shared = words(context)
            for turn, pair in enumerate(zip(loras["activated"], loras["plain"], strict=True)):
                for kind, lora in zip(kinds, pair, strict=True):
                    prompt = [*shared, *INVOCATION, *words(TAIL)]
                    seconds, found = first_token_s(llm, prompt, lora)
                    if turn:
                        times[kind].append(seconds)
                        cached[kind].add(found)
        llm.llm_engine.engine_core.shutdown(timeout=30.0)
    for kind, found in times.items():
        yield Figure("", f"{kind}, ms to the first token", [1e3 * seconds for seconds in found])
        yield Figure("", f"{kind}, tokens from the cache", sorted(cached[kind]))
    pairs = zip(times["plain"], times["activated"], strict=True)
    yield Figure("", "plain / activated", [plain / activated for plain, activated in pairs])
