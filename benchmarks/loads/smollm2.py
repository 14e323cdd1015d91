"""SmolLM2-135M-Instruct, the base model of most benchmarks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from benchmarks.harness.results import ROOT


def base_model() -> Path:
    """The folder of its checkpoint, which the demo unpacks on first use."""
    build = runpy.run_path(str(ROOT / "examples" / "demo" / "base_model.py"))["build_base_model"]
    path: Path = build()
    return path


def model_config() -> dict[str, Any]:
    """What its `config.json` says."""
    config: dict[str, Any] = json.loads((base_model() / "config.json").read_text())
    return config
