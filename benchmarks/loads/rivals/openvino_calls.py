"""OpenVINO GenAI: the adapter is the pipeline's for a call, so calls take turns by adapter."""

import json
import sys
import time

import openvino_genai as genai


def main():
    job = json.load(sys.stdin)
    adapters = [genai.Adapter(f"{path}/adapter_model.safetensors") for path in job["adapters"]]
    pipeline = genai.LLMPipeline(job["model"], "CPU", adapters=genai.AdapterConfig(adapters))
    prompt = job["requests"][0]["prompt"]
    plain, adapted = (
        pipeline.generate(prompt, adapters=genai.AdapterConfig(chosen), max_new_tokens=16)
        for chosen in ([], [(adapters[0], 1e4)])  # so much of it that it must show
    )
    assert plain != adapted, "adapters change nothing"
    groups = {}
    for place, one in enumerate(job["requests"]):
        groups.setdefault(one["adapter"], []).append(place)
    found = {"seconds": [], "first_ms": []}
    for number in range(-1, job["rounds"]):
        first = [0.0] * len(job["requests"])
        began = time.perf_counter()
        for adapter, places in groups.items():
            begin = time.perf_counter()
            result = pipeline.generate(
                [job["requests"][place]["prompt"] for place in places],
                adapters=genai.AdapterConfig(adapters[adapter]),
                max_new_tokens=job["new_tokens"],
                min_new_tokens=job["new_tokens"],
                ignore_eos=True,
                do_sample=False,
                apply_chat_template=False,
            )
            waited = 1000 * (begin - began) + result.perf_metrics.get_ttft().mean
            for place in places:
                first[place] = waited
            made = result.perf_metrics.get_num_generated_tokens()
            assert made == len(places) * job["new_tokens"], made
        if number >= 0:
            found["seconds"].append(time.perf_counter() - began)
            found["first_ms"].append(first)
    json.dump(found, sys.stdout)


main()
