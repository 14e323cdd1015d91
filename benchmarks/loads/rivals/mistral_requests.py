"""mistral.rs: each request names its adapter; a first token is timed as an answer of one token."""

import json
import sys
import threading
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

    def all_at_once(new_tokens):
        began = time.perf_counter()
        seconds = [0.0] * len(job["requests"])

        def ask(place, one):
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
            seconds[place] = time.perf_counter() - began
            assert answer.usage.completion_tokens == new_tokens, answer.usage

        clients = [threading.Thread(target=ask, args=each) for each in enumerate(job["requests"])]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return seconds

    found = {"seconds": [], "first_ms": []}
    for number in range(-1, job["rounds"]):
        first, whole = all_at_once(1), all_at_once(job["new_tokens"])
        if number >= 0:
            found["seconds"].append(max(whole))
            found["first_ms"].append([1000 * one for one in first])
    json.dump(found, sys.stdout)


main()
