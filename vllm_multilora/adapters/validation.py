"""Everything that is wrong with an adapter, found before any of it is loaded."""

from __future__ import annotations

from pathlib import Path

from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS, SizeLimits
from vllm_multilora.adapters.problems import Problem


def validate(
    folder: str | Path,
    layout: ModelLayout,
    *,
    check_finite: bool = True,
    allow_pickle: bool = False,
    limits: SizeLimits = DEFAULT_LIMITS,
) -> list[Problem]:
    """Says all that is wrong with an adapter, one problem for each cause; none: it can be served.

    Nothing is changed, executed or loaded: besides the configuration and the header, weights are
    only looked at, span by span.
    """
    rules = Rules(check_finite=check_finite, allow_pickle=allow_pickle)
    try:
        with open_adapter(str(folder), rules, limits) as source:
            intake = source.check([layout])
            if check_finite:
                intake.read(None, None)
    except AdapterError as error:
        return list(error.problems)
    return []
