"""A file of prompts for many adapters, answered in one go without a server.

    python examples/patterns/offline_batch.py --model MODEL --adapters /adapters \
        --input requests.jsonl --output answers.jsonl

Each line of the input is `{"prompt": "...", "adapter": "acme"}`, where `acme` is a sub-folder of
`--adapters`; a line without `adapter` goes to the base model. The answers come in the order of the
input, each with `text`, or with `error` where its adapter could not be loaded: the others are
answered all the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest


def adapter_requests(names: set[str], adapters: Path) -> dict[str, LoRARequest]:
    """One `LoRARequest` an adapter, each with a number of its own."""
    return {
        name: LoRARequest(name, number, str(adapters / name))
        for number, name in enumerate(sorted(names), start=1)
    }


def result(request: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
    """A request with its answer."""
    completion = output.outputs[0]
    if completion.finish_reason == "error":
        return {**request, "error": completion.stop_reason}
    return {**request, "text": completion.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-loras", type=int, default=16)
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    requests = [json.loads(line) for line in arguments.input.read_text().splitlines() if line]
    names = {request["adapter"] for request in requests if request.get("adapter")}
    adapters = adapter_requests(names, arguments.adapters)
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        enable_lora=True,
        max_loras=min(arguments.max_loras, max(1, len(names))),
        max_lora_rank=arguments.max_lora_rank,
        # Adapters are read on these threads while other adapters' requests run.
        additional_config={"multilora": {"loader_threads": 4}},
    )
    outputs = llm.generate(
        [request["prompt"] for request in requests],
        SamplingParams(temperature=0, max_tokens=arguments.max_tokens),
        lora_request=[adapters.get(request.get("adapter", "")) for request in requests],
    )
    with arguments.output.open("w") as file:
        for request, output in zip(requests, outputs, strict=True):
            print(json.dumps(result(request, output), ensure_ascii=False), file=file)


if __name__ == "__main__":
    main()
