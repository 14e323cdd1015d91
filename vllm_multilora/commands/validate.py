"""`vllm-multilora validate`: checks adapters before they are deployed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm_multilora.commands.quiet import quieten_vllm
from vllm_multilora.commands.table import aligned
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm_multilora.adapters.layout import ModelLayout
    from vllm_multilora.adapters.problems import Problem

VALID, INVALID = 0, 1
_HEADER = ("ADAPTER", "RESULT", "CODE", "COUNT", "WHERE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="an adapter's folder")
    parser.add_argument(
        "--model",
        required=True,
        help="the base model's folder or name, as for vllm serve; its weights are not read",
    )
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        metavar="N",
        help="the server's --max-lora-rank (default: %(default)s, as in vLLM)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        help="the server's --dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--lora-dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16"),
        help="the server's --lora-dtype; values must not overflow (default: the base model's)",
    )
    parser.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="the server's --lora-target-modules, given after the folders: an adapter without any "
        "of them is refused (default: all that the base model supports)",
    )
    parser.add_argument(
        "--check-finite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read all weights and look for NaN, infinity and overflow",
    )
    parser.add_argument(
        "--multilora-allow-pickle",
        action="store_true",
        help="also read adapter_model.bin and .pt, as the server does with this flag",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the base model"
    )
    parser.add_argument(
        "--multilora-dora",
        action="store_true",
        help="accept DoRA adapters, as the server does with this flag",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _offline_layout(arguments: argparse.Namespace) -> ModelLayout:
    quieten_vllm()
    from vllm_multilora.integration.offline.model import Server, offline_layout

    modules = arguments.lora_target_modules
    return offline_layout(
        Server(
            arguments.model,
            max_lora_rank=arguments.max_lora_rank,
            lora_target_modules=None if modules is None else tuple(modules),
            dtype=arguments.dtype,
            lora_dtype=arguments.lora_dtype,
            trust_remote_code=arguments.trust_remote_code,
            dora=arguments.multilora_dora,
        )
    )


def run(
    arguments: argparse.Namespace,
    layout_of: Callable[[argparse.Namespace], ModelLayout] = _offline_layout,
) -> int:
    """Runs the command.

    Args:
        arguments: Those of `add_arguments`.
        layout_of: Finds out what the base model accepts.

    Returns:
        0 if all adapters can be served, 1 if one cannot.

    Raises:
        MultiLoRAError: What the base model accepts cannot be told.
    """
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
        print(json.dumps(_as_json(arguments, found), indent=2))
    else:
        print("\n".join(_table(found)))
    return INVALID if any(found.values()) else VALID


def _as_json(
    arguments: argparse.Namespace, found: Mapping[str, list[Problem]]
) -> dict[str, object]:
    return {
        "model": arguments.model,
        "max_lora_rank": arguments.max_lora_rank,
        "adapters": [
            {
                "path": folder,
                "valid": not problems,
                "problems": [problem.as_dict() for problem in problems],
            }
            for folder, problems in found.items()
        ],
    }


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
