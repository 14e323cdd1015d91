"""The `vllm-multilora` command; each subcommand is one function that returns an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_multilora import __version__
from vllm_multilora.adapters import validate_command
from vllm_multilora.cache import simulate_command
from vllm_multilora.operations import advise_command, status_command
from vllm_multilora.planning import plan_command
from vllm_multilora.planning.base_model import BaseModel


def _doctor(arguments: argparse.Namespace) -> int:
    from vllm_multilora.integration.doctor import diagnose

    return diagnose()


def _validate(arguments: argparse.Namespace) -> int:
    _quieten_vllm()
    from vllm_multilora.integration.offline_layout import offline_layout

    return validate_command.run(
        arguments,
        lambda given: offline_layout(
            given.model,
            max_lora_rank=given.max_lora_rank,
            dtype=given.dtype,
            lora_dtype=given.lora_dtype,
            lora_target_modules=given.lora_target_modules,
            trust_remote_code=given.trust_remote_code,
        ),
    )


def _plan(arguments: argparse.Namespace) -> int:
    _quieten_vllm()

    def costs_of(given: argparse.Namespace) -> BaseModel:
        from vllm_multilora.integration.offline_costs import offline_costs
        from vllm_multilora.integration.offline_model import Server

        modules = given.lora_target_modules
        return offline_costs(
            Server(
                given.model,
                max_lora_rank=given.max_lora_rank,
                tensor_parallel_size=given.tensor_parallel_size,
                fully_sharded_loras=given.fully_sharded_loras,
                lora_target_modules=None if modules is None else tuple(modules),
                dtype=given.dtype,
                lora_dtype=given.lora_dtype,
                max_model_len=given.max_model_len,
                trust_remote_code=given.trust_remote_code,
            )
        )

    return plan_command.run(arguments, costs_of)


def _quieten_vllm() -> None:
    """Called before vLLM is imported: it logs to standard output, where tables and JSON belong."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="vllm-multilora", description="Multi-tenant LoRA serving for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="say whether vLLM sees the plugin, and what will run",
        description="Checks the installation: is the plugin seen by vLLM, which vLLM and platform "
        "are there, which patches are in place, which kernels will run. Exits with 1 if the plugin "
        "would not act.",
    )
    doctor.set_defaults(run=_doctor)
    simulate = commands.add_parser(
        "simulate",
        help="replay a trace against the adapter cache under every policy",
        description="Says how often requests would have found their adapter in a slot or in host "
        "memory, what was loaded, copied and evicted, and how far each policy is from the best "
        "possible. The cache is the server's own code.",
    )
    simulate_command.add_arguments(simulate)
    simulate.set_defaults(run=simulate_command.run)
    advise = commands.add_parser(
        "advise",
        help="say what to change about a running server, and why",
        description="Watches a server, or asks a Prometheus that has watched it, and compares what "
        "it sees with the rules for serving many adapters. Exits with 0 if there is nothing to "
        "change, with 1 if there is, with 2 if that cannot be told.",
    )
    advise_command.add_arguments(advise)
    advise.set_defaults(run=advise_command.run)
    status = commands.add_parser(
        "status",
        help="show every adapter of a running server: where it is, and how it is used",
        description="Shows what GET /v1/lora_adapters of a server says. Exits with 2 if that "
        "cannot be had.",
    )
    status_command.add_arguments(status)
    status.set_defaults(run=status_command.run)
    plan = commands.add_parser(
        "plan",
        help="say what adapter slots cost, before a server is started",
        description="Says, to the byte, what a setting of --max-loras and --max-lora-rank takes of "
        "a GPU's memory and so of the KV cache, and what a directory's adapters need. Only the "
        "base model's config.json is read. Exits with 2 if the costs cannot be told.",
    )
    plan_command.add_arguments(plan)
    plan.set_defaults(run=_plan)
    validate = commands.add_parser(
        "validate",
        help="say whether adapters can be served over a base model",
        description="Checks adapters as the server does when they are registered, without the base "
        "model's weights. Exits with 0 if all can be served, with 1 if one cannot, with 2 if that "
        "cannot be told.",
    )
    validate_command.add_arguments(validate)
    validate.set_defaults(run=_validate)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
