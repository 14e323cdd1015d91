"""What adapter slots cost, before a server is started: arithmetic over what vLLM would allocate.

    model = offline_costs(Server("/models/llama"))  # integration: vLLM's own layers
    survey = survey_adapters(Path("/adapters"), model.layouts[model.ranks[-1]])
    Plan(model, max_loras=16, max_lora_rank=16, survey=survey).total

`slot_memory` and `kv_cache` hold the facts, `adapter_survey` reads a directory of adapters,
`advice` draws conclusions. Nothing here knows vLLM.
"""
