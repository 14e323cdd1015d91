"""One engine through vLLM's Python API, `LLM(...)`, in a process of its own.

The demo runs two of these beside the server, so that all three engines start at the same time:

    python offline.py auto FD    # the plugin
    python offline.py vllm FD    # vLLM's own kernels

Each writes `"ready"` to the file descriptor FD and then answers commands, one line of JSON in by
stdin and one out by FD: `"answers"` gives every customer's answer, `"adapters"` and `"base"` the
seconds that a small batch takes with and without adapters.
"""

import json
import os
import sys
import time
from pathlib import Path

from base_model import build_base_model
from prompts import (
    ADAPTED,
    ADAPTERS,
    COMPARED_REQUESTS,
    COMPARED_TOKENS,
    CUSTOMERS,
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
    """An engine with room for all adapters at once."""
    return LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=16,
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
    begin = time.perf_counter()
    engine.generate(
        [{"prompt_token_ids": list(range(1000, 1064))}] * COMPARED_REQUESTS,
        SamplingParams(temperature=0, max_tokens=COMPARED_TOKENS, ignore_eos=True),
        lora_request=[REQUESTS[name] if adapters else None for name in names],
        use_tqdm=False,
    )
    return time.perf_counter() - begin


def main() -> None:
    """Starts the engine and serves commands until the input ends."""
    backend, descriptor = sys.argv[1:]
    replies = os.fdopen(int(descriptor), "w")

    def reply(value: object) -> None:
        print(json.dumps(value), file=replies, flush=True)

    engine = start(build_base_model(), backend)
    reply("ready")
    for line in sys.stdin:
        command = json.loads(line)
        if command == "answers":
            reply(answers(engine))
        elif command in ("adapters", "base"):
            reply(seconds(engine, adapters=command == "adapters"))
        else:
            raise SystemExit(f"unknown command {command!r}; known: answers, adapters, base")
    engine.llm_engine.engine_core.shutdown(timeout=30)


if __name__ == "__main__":
    main()
