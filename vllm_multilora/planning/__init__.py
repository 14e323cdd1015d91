"""What adapter slots cost, before a server is started: arithmetic over what vLLM would allocate.

    model = offline_costs(Server("/models/llama"))  # integration: vLLM's own layers
    survey = survey_adapters(Path("/adapters"), model.layouts[model.ranks[-1]])
    report(Plan(model, max_loras=16, max_lora_rank=16, survey=survey))

`slot_memory` and `kv_cache` hold the facts, `adapter_survey` reads a directory of adapters,
`advice` draws conclusions, `report` and `plan_command` show them. Nothing here knows vLLM.
"""
