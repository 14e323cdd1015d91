"""Says which kernels serve which layers: in the log, and as rows for metrics and status."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.lora.layers import BaseLayerWithLoRA

from multilora_kernels.trial.choices import Choice
from multilora_kernels.trial.records import Record
from vllm_multilora.integration.step.punica_prepared import OURS
from vllm_multilora.integration.step.stock_rows import ClassificationHead
from vllm_multilora.integration.worker.model.model_layout import is_ranked
from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)

NOT_TRIED = "could not be tried"
"""The problem with kernels of which a trial could not be run."""

_EXPERTS = "vLLM's serve experts, since ours do not take rows by expert"
_HEADS = "ours serve classification heads unchecked, once a request"


def report(record: Record, card: str) -> None:
    """Logs one line for each kind that ours do not serve alone, and one for all others."""
    ours = [entry for entry in record.entries if entry.choice.backends == {OURS}]
    if ours:
        logger.info("LoRA kernels on %s: ours serve %s of layer.", card, counted(len(ours), "kind"))
    for entry in record.entries:
        choice = entry.choice
        if choice.backends == {OURS}:
            continue
        why = reason_of(choice)
        log = logger.warning if why in ("wrong", "unchecked") else logger.info
        problem = choice.problems.get(OURS)
        log(
            "LoRA kernels on %s: %s for %s (%s): ours are %s%s.",
            card,
            choice.describe(),
            entry.description,
            ", ".join(entry.layers),
            {"wrong": "wrong here", "slower": "slower", "asked": "switched off"}.get(
                why, "unchecked"
            ),
            f": {problem}" if problem else "",
        )


def report_unchosen(layers: Iterable[Any], card: str) -> None:
    """Logs which layers were not part of the choice, if there are any."""
    found = {
        _HEADS if isinstance(layer, ClassificationHead) else _EXPERTS
        for layer in layers
        if isinstance(layer, BaseLayerWithLoRA) and not is_ranked(layer)
    }
    if found:
        said = "; ".join(text for text in (_EXPERTS, _HEADS) if text in found)
        logger.info("LoRA kernels on %s, without a choice: %s.", card, said)


def reason_of(choice: Choice) -> str:
    """Why these kernels serve, in a word: `checked`, `wrong`, `slower`, `asked`, `unchecked`."""
    if choice.backends == {OURS}:
        return "checked"
    problem = choice.problems.get(OURS)
    if problem is None:
        return "slower" if choice.microseconds else "asked"
    return "unchecked" if problem == NOT_TRIED else "wrong"


def kernel_rows(record: Record | None) -> list[dict[str, str]]:
    """A record as plain rows, one for each kind of layer and range of rows."""
    found = []
    for entry in () if record is None else record.entries:
        below = 0
        for most, name in entry.choice.ranges:
            if most is None:
                rows = f"above {below}" if below else "all"
            else:
                rows = f"{below + 1} to {most}"
            below = most or below
            found.append(
                {
                    "kind": entry.description,
                    "layers": ",".join(entry.layers),
                    "rows": rows,
                    "kernels": name,
                    "reason": reason_of(entry.choice),
                    "problem": entry.choice.problems.get(OURS, ""),
                }
            )
    return found
