"""Adapters for the tiny Llama of the serving tests: good ones, and each way of being bad.

`BAD` and `VALID` hold them by name; each writes itself into a folder. They need no model: what the
base accepts is `llama_layout.LAYOUT`.
"""

from importlib import import_module

from .cases import BAD, BAD_DORA, VALID
from .llama_layout import DORA_LAYOUT, LAYOUT

__all__ = ["BAD", "BAD_DORA", "DORA_LAYOUT", "LAYOUT", "VALID"]

for _kind in ("activated", "config", "dora", "files", "headers", "tensors"):
    import_module(f"{__name__}.bad_{_kind}")
import_module(f"{__name__}.valid_variants")
