"""What adapter slots cost, before a server is started: arithmetic over what vLLM would allocate.

    model = offline_costs(ServerFlags("/models/llama"))  # integration: vLLM's own layers
    survey = survey_adapters(Path("/adapters"), model.layouts[model.ranks[-1]])
    MemoryPlan(model, max_loras=16, max_lora_rank=16, survey=survey).total

`integration.offline` has what a base model allocates, `adapter_survey` reads a directory of
adapters, `memory_plan` draws conclusions. Nothing here knows vLLM.
"""
