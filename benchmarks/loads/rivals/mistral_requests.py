"""mistral.rs: each request names its adapter; a runner answers one call at a time.

When a first token would come is timed by an answer of one token.
"""

import json
import sys
import time

import mistralrs


def main():
    job = json.load(sys.stdin)
    adapters = [
        mistralrs.LoraAdapter(f"a{number}", path) for number, path in enumerate(job["adapters"])
    ]
    runner = mistralrs.Runner(
        mistralrs.Which.Lora(
            job["model"],
            adapters=adapters,
            dtype=mistralrs.ModelDType.BF16,
            max_adapters=len(adapters),
        ),
        max_seqs=len(job["requests"]),
        prefix_cache_n=0,
    )

    def answer(one, new_tokens):
        begin = time.perf_counter()
        answer = runner.send_completion_request(
            mistralrs.CompletionRequest(
                prompt=one["prompt"],
                model="default",
                max_tokens=new_tokens,
                temperature=0.0,
                ignore_eos=True,
                adapter=f"a{one['adapter']}",
            )
        )
        assert answer.usage.completion_tokens == new_tokens, answer.usage
        return time.perf_counter() - begin

    found = {"seconds": [], "first_ms": []}
    for number in range(-1, job["rounds"]):
        waited, first = 0.0, []
        for one in job["requests"]:
            first.append(1000 * (waited + answer(one, 1)))
            waited += answer(one, job["new_tokens"])
        if number >= 0:
            found["seconds"].append(waited)
            found["first_ms"].append(first)
    json.dump(found, sys.stdout)


main()
