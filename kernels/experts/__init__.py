"""Adapters of experts: products of a mixture's layers for rows that have adapters of these.

A row has `top_k` experts and at most one adapter, so its work is `top_k` pairs of an expert and an
adapter. On CPUs `pairs` sorts a step's pairs, `packed` multiplies them by the experts' own weights,
and `products` puts these and the adapters' products together. `pair_products` is for GPUs.
"""

from multilora_kernels.experts.packed import PackedExperts
from multilora_kernels.experts.products import ACTIVATIONS, ExpertAdapters, ExpertProducts

__all__ = ["ACTIVATIONS", "ExpertAdapters", "ExpertProducts", "PackedExperts"]
