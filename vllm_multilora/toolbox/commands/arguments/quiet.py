"""Keeps vLLM's own output out of what a command prints."""

from __future__ import annotations

import logging
import os


def quieten_vllm() -> None:
    """Called before vLLM is imported: it logs to standard output, where tables and JSON belong."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Warns of every try, where vLLM's error tells of all of them.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Warns that Triton is of no use on CPUs, before vLLM's logging is set up.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
