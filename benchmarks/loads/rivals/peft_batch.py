"""PEFT: one padded batch of `generate`, with an adapter's name for each row."""

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class FirstLogits(LogitsProcessor):
    """Notes when the first logits are there."""

    def __init__(self):
        self.at = None

    def __call__(self, input_ids, scores):
        self.at = self.at or time.perf_counter()
        return scores


def main():
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    first, *others = job["adapters"]
    model = PeftModel.from_pretrained(base, first, adapter_name="a0")
    for number, path in enumerate(others, 1):
        model.load_adapter(path, adapter_name=f"a{number}")
    model.eval()
    batch = tokenizer([one["prompt"] for one in job["requests"]], return_tensors="pt", padding=True)
    names = [f"a{one['adapter']}" for one in job["requests"]]
    found = {"seconds": [], "first_ms": []}
    for number in range(-1, job["rounds"]):
        logits = FirstLogits()
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                **batch,
                adapter_names=names,
                min_new_tokens=job["new_tokens"],
                max_new_tokens=job["new_tokens"],
                do_sample=False,
                logits_processor=LogitsProcessorList([logits]),
            )
        end = time.perf_counter()
        assert output.shape[1] == batch["input_ids"].shape[1] + job["new_tokens"]
        if number >= 0:
            found["seconds"].append(end - begin)
            found["first_ms"].append([1000 * (logits.at - begin)] * len(names))
    json.dump(found, sys.stdout)


main()
