"""Packing by either of its codes."""

import pytest

from multilora_kernels.native import load_packing_library
from multilora_kernels.packs import packing


@pytest.fixture(params=["native", "numpy"])
def backend(request, monkeypatch):
    """Packs by C, or by numpy."""
    library = load_packing_library() if request.param == "native" else None
    monkeypatch.setattr(packing, "_best_library", lambda: library)
