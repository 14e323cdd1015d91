"""The kernels' measuring rig: benchmarks, tuner, work counter and compiler's report.

Run its commands at the root of a checkout, `python -m tools.kernels.bench` for example. `measure`
has what they share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parents[2] / "kernels"


class _CheckoutFinder(MetaPathFinder):
    """Finds the checkout's own `multilora_kernels` where the package is not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "multilora_kernels":
            return None
        return spec_from_file_location(
            name, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )


sys.meta_path.append(_CheckoutFinder())
