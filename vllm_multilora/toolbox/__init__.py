"""The commands of `vllm-multilora`, and what they plan, simulate, measure and advise with."""
