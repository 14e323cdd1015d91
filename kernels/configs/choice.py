"""The configuration for a workload: the table's word, else the computed default."""

from __future__ import annotations

from functools import lru_cache

from multilora_kernels.configs.config_facts import ExpandConfig, ShrinkConfig, Workload
from multilora_kernels.configs.config_table import load_table
from multilora_kernels.configs.defaults import (
    default_expand,
    default_shrink,
    invariant_expand,
    invariant_shrink,
)


@lru_cache(maxsize=1024)
def choose_shrink(workload: Workload, *, batch_invariant: bool = False) -> ShrinkConfig:
    """The first half's configuration.

    Raises:
        ConfigTableError: The architecture's table is not valid.
    """
    if batch_invariant:
        return invariant_shrink(workload)
    for entry in load_table(workload.architecture).shrink:
        if entry.matches(workload):
            return entry.config or default_shrink(workload)
    return default_shrink(workload)


@lru_cache(maxsize=1024)
def choose_expand(workload: Workload, *, batch_invariant: bool = False) -> ExpandConfig:
    """The second half's configuration.

    Raises:
        ConfigTableError: The architecture's table is not valid.
    """
    if batch_invariant:
        return invariant_expand(workload)
    for entry in load_table(workload.architecture).expand:
        if entry.matches(workload):
            return entry.config or default_expand(workload)
    return default_expand(workload)
