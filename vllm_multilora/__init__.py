"""vllm-multilora: a vLLM plugin that serves many LoRA adapters over one base model.

Installed beside vLLM it is found through entry points; docs/settings.md has its flags.
"""

__version__ = "0.1.0"
