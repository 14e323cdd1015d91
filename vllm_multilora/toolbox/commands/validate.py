"""`vllm-multilora validate`: checks adapters before they are deployed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm_multilora.toolbox.commands.output.text_table import aligned
from vllm_multilora.toolbox.commands.shared_arguments import add_server_flags, server_of
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm_multilora.adapters.model.layout import ModelLayout
    from vllm_multilora.adapters.problems import Problem

VALID, INVALID = 0, 1
_HEADER = ("ADAPTER", "RESULT", "CODE", "COUNT", "WHERE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="DIR",
        help="an adapter's folder; not right after --lora-target-modules, which would take it",
    )
    server = add_server_flags(parser, needs_model=True)
    server.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        metavar="R",
        help="rank of the slots (default: %(default)s, as in vLLM)",
    )
    server.add_argument(
        "--multilora-allow-pickle", action="store_true", help="read adapter_model.bin and .pt, too"
    )
    parser.add_argument(
        "--check-finite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read all weights and look for NaN, infinity and overflow",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _offline_layout(arguments: argparse.Namespace) -> ModelLayout:
    server = server_of(arguments)
    from vllm_multilora.integration.offline.model_without_weights import offline_layout

    return offline_layout(server)


def run(
    arguments: argparse.Namespace,
    layout_of: Callable[[argparse.Namespace], ModelLayout] = _offline_layout,
) -> int:
    """Runs the command; `layout_of` finds out what the base model accepts."""
    from vllm_multilora.adapters.validation import validate

    layout = layout_of(arguments)
    found = {
        folder: validate(
            folder,
            layout,
            check_finite=arguments.check_finite,
            allow_pickle=arguments.multilora_allow_pickle,
        )
        for folder in arguments.adapters
    }
    if arguments.json:
        rows = [
            {"path": path, "valid": not found[path], "problems": [p.as_dict() for p in found[path]]}
            for path in found
        ]
        report = {"model": arguments.model, "max_lora_rank": arguments.max_lora_rank}
        print(json.dumps(report | {"adapters": rows}, indent=2))
    else:
        print("\n".join(_table(found)))
    return INVALID if any(found.values()) else VALID


def _table(found: Mapping[str, list[Problem]]) -> list[str]:
    """One line an adapter or problem, then each problem as a sentence, then a summary."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for folder, problems in found.items():
        rows += [
            (folder, "invalid", problem.code.value, str(problem.count), problem.where)
            for problem in problems
        ] or [(folder, "ok", "", "", "")]
    lines = aligned(rows)
    for problems in found.values():
        lines += ["", *(f"- {problem}" for problem in problems)] if problems else []
    invalid = sum(bool(problems) for problems in found.values())
    return [*lines, "", f"{counted(len(found), 'adapter')}, {invalid} cannot be served"]
