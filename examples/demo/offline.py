"""The demo's offline part: the same batch through vLLM's Python API, and a throughput table.

`demo.py` runs this beside its server, since starting is most of its work: the engines start and
answer, and wait for a line on standard input before anything is printed or timed. Alone:
`echo | python examples/demo/offline.py`.
"""

import os
import sys
import time
from pathlib import Path

# Both engines in this process. By default each would start two processes, which import vLLM anew.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from base_model import build_base_model
from display import UNSTYLED, heading, say, show_all
from prompts import (
    ADAPTED,
    ADAPTERS,
    COMPARED_PROMPT_TOKENS,
    COMPARED_REQUESTS,
    COMPARED_TOKENS,
    CUSTOMERS,
    KV_CACHE_BYTES,
    MAX_LORA_RANK,
    NEW_TOKENS,
)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

REQUESTS = {
    customer.adapter: LoRARequest(str(customer.adapter), number, str(ADAPTERS / customer.adapter))
    for number, customer in enumerate(ADAPTED, start=1)
}


def start(model: Path, backend: str) -> LLM:
    """An engine with room for all adapters at once; `backend` names its LoRA kernels."""
    return LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=len(ADAPTED),
        max_lora_rank=MAX_LORA_RANK,
        additional_config={"multilora": {"backend": backend}},
    )


def answers(engine: LLM) -> list[str]:
    """The answers to all customers, asked in one batch, each by its own adapter."""
    outputs = engine.chat(
        [[{"role": "user", "content": customer.prompt}] for customer in CUSTOMERS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        lora_request=[REQUESTS.get(customer.adapter) for customer in CUSTOMERS],
        use_tqdm=False,
    )
    return [output.outputs[0].text.strip() for output in outputs]


def seconds(engine: LLM, *, adapters: bool) -> float:
    """How long a batch takes, its requests spread over the adapters or all for the base model."""
    names = [ADAPTED[i % len(ADAPTED)].adapter for i in range(COMPARED_REQUESTS)]
    prompt = {"prompt_token_ids": list(range(1000, 1000 + COMPARED_PROMPT_TOKENS))}
    for new_tokens in (1, COMPARED_TOKENS):  # The first round loads adapters and does not count.
        begin = time.perf_counter()
        engine.generate(
            [prompt] * COMPARED_REQUESTS,
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
            lora_request=[REQUESTS[name] if adapters else None for name in names],
            use_tqdm=False,
        )
    return time.perf_counter() - begin


def compare_throughput(plugin: LLM, stock: LLM) -> None:
    """Prints how long the same batch takes for the base model, the plugin and stock vLLM."""
    rows = (
        ("base model alone", plugin, False),
        ("plugin, mixed adapters", plugin, True),
        ("stock vLLM, mixed adapters", stock, True),
    )
    for label, engine, adapters in rows:
        took = seconds(engine, adapters=adapters)
        rate = COMPARED_REQUESTS * COMPARED_TOKENS / took
        say(f"  {label:28} {took:7.2f} s  {rate:7.1f} tokens/s")
    say("  Stock's time grows with the prompts and with --max-lora-rank: 28 times the plugin's for")
    say("  16 prompts of 100 tokens at rank 64 (`python -m benchmarks run cpu_throughput`).")


def main() -> int:
    """Starts both engines, answers, waits, shows and compares; returns the exit status."""
    model = build_base_model()
    plugin, stock = start(model, "auto"), start(model, "vllm")
    given = answers(plugin)
    if not sys.stdin.readline():
        return 1  # Whoever was to say when has gone.

    heading("3. The same through LLM(...)")
    say(f"  {len(given)} requests answered in one batch")
    is_styled = show_all(given)
    heading(f"4. Throughput of {COMPARED_REQUESTS} requests over {len(ADAPTED)} adapters")
    compare_throughput(plugin, stock)
    for engine in (plugin, stock):
        engine.llm_engine.engine_core.shutdown()
    say("  engines stopped")
    return 0 if is_styled else UNSTYLED


if __name__ == "__main__":
    sys.exit(main())
