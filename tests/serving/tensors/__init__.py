"""Adapters that frameworks for training give to vLLM as tensors."""
