"""Adapters for the tiny Llama of the serving tests: good ones, and each way of being bad.

`BAD` and `VALID` hold them by name; each writes itself into a folder. They need no model: what the
base accepts is `llama_layout.LAYOUT`.
"""

from . import (
    bad_activated,
    bad_config,
    bad_dora,
    bad_files,
    bad_headers,
    bad_tensors,
    valid_variants,
)
from .cases import BAD, BAD_DORA, VALID, BadAdapter, ValidAdapter
from .llama_layout import DORA_LAYOUT, LAYOUT

__all__ = [
    "BAD",
    "BAD_DORA",
    "DORA_LAYOUT",
    "LAYOUT",
    "VALID",
    "BadAdapter",
    "ValidAdapter",
    "bad_activated",
    "bad_config",
    "bad_dora",
    "bad_files",
    "bad_headers",
    "bad_tensors",
    "valid_variants",
]
