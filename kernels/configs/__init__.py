"""Which blocks a Triton kernel works on: a computed default, or a table measured on the card.

`choose_shrink` and `choose_expand` answer from shapes alone, never from what a batch holds, so
the answer stays true for a captured graph. A table for the device's architecture comes first,
its entries in order; where none fits, `default_shrink` and `default_expand` compute blocks from
the workload. In batch-invariant mode neither the table nor the token count has a say.
"""

from multilora_kernels.configs.choice import choose_expand, choose_shrink
from multilora_kernels.configs.config_facts import MIN_BLOCK, ExpandConfig, ShrinkConfig, Workload
from multilora_kernels.configs.config_table import ConfigTableError, load_table
from multilora_kernels.configs.defaults import default_expand, default_shrink

__all__ = [
    "MIN_BLOCK",
    "ConfigTableError",
    "ExpandConfig",
    "ShrinkConfig",
    "Workload",
    "choose_expand",
    "choose_shrink",
    "default_expand",
    "default_shrink",
    "load_table",
]
