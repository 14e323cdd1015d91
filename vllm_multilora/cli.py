"""The `vllm-multilora` command. A subcommand's module is imported only when it is run."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vllm_multilora import __version__
from vllm_multilora.errors import MultiLoRAError


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: Its line among all commands.
        description: What its own help begins with.
        examples: What its own help ends with, without the program's name.
        module: Its module in `vllm_multilora.toolbox.commands`; empty: as the command.
    """

    help: str
    description: str
    examples: tuple[str, ...]
    module: str = ""


_EXTRAS = {"vllm": "cuda]' or '[cpu", "shtab": "completion", "model_signing": "signing"}
"""Modules that commands need, and the extra that installs each."""

COMPLETION = "completion"
"""The command that knows the arguments of all others."""

COMMANDS = {
    "doctor": Command(
        "check the installation: does vLLM see the plugin, and what will run",
        "Checks the installation: whether vLLM sees the plugin, which vLLM and platform there "
        "are, which patches apply, and which kernels will run. Exits with 1 if the plugin would "
        "do nothing.",
        ("doctor", "doctor --against vllm-0.33.0-cp38-abi3-manylinux1_x86_64.whl"),
        "doctor_command",
    ),
    "digest": Command(
        "print which version of its weights each adapter has",
        "Prints each adapter's digest, computed over its configuration and all of its tensors as "
        "a server does when it loads the adapter. Exits with 1 if one cannot be read, with 2 if "
        "two folders for --json have the same name.",
        ("digest adapters/acme adapters/globex", "digest adapters/* --json > digests.json"),
        "digest_command",
    ),
    "sign": Command(
        "sign an adapter's folder",
        "Signs all files of a folder with a private key, following OpenSSF model signing, and "
        "writes the signature to model.sig in that folder. Exits with 2 if that fails.",
        (
            "sign adapters/acme --key signing.key",
            "sign adapters/* --key signing.key --certificate signing.crt",
        ),
    ),
    "verify": Command(
        "check adapters' signatures",
        "Checks adapters' signatures as a server that requires them does. Exits with 0 if all are "
        "valid, with 1 if one is not, with 2 if the keys cannot be used.",
        ("verify adapters/acme --keys signing.pub", "verify adapters/* --keys trusted.pem"),
    ),
    "simulate": Command(
        "replay a trace against the adapter cache under every policy",
        "Reports how often requests would have found their adapter in a slot or in host memory, "
        "what would have been loaded, copied and evicted, and how far each policy is from the "
        "optimum. It runs the server's own cache code.",
        (
            "simulate --synthetic zipf --adapters 500 --max-loras 16",
            "simulate trace.csv --max-loras 32 --policy lru --policy gdsf --json",
        ),
    ),
    "advise": Command(
        "recommend changes to a running server, with reasons",
        "Watches a server, or asks a Prometheus that has scraped it, and compares what it finds "
        "with the rules for serving many adapters. Exits with 0 if there is nothing to change, "
        "with 1 if there is, with 2 if the server or Prometheus gives no answer.",
        (
            "advise --url http://localhost:8000 --window 60",
            "advise --prometheus http://localhost:9090 --window 86400",
        ),
    ),
    "status": Command(
        "show every adapter of a running server: where it is and how it is used",
        "Shows a server's GET /v1/lora_adapters as a table. Exits with 2 if the server gives no "
        "answer.",
        ("status --url http://localhost:8000 --watch", "status --json"),
    ),
    "adapters": Command(
        "load a folder's adapters on several servers, and keep them loaded",
        "Loads every adapter of a folder on vLLM servers, or on workers of Dynamo's, which forget "
        "what was loaded when they are started again. What is loaded already is loaded again once: "
        "its files may have changed. Exits with 1 if a server does not answer or refuses one.",
        (
            "adapters sync ./adapters --workers http://localhost:8000",
            "adapters sync ./adapters --workers http://10.0.0.7:8081 http://10.0.0.8:8081 --every",
        ),
    ),
    "tenants": Command(
        "create and hash tenants' keys, and check a tenants file",
        "Creates keys for the file given to --multilora-tenants, which contains only their "
        "hashes, and checks whether such a file is valid. Exits with 1 if it is not.",
        ("tenants new", "tenants check /etc/vllm/tenants.yaml"),
    ),
    "store": Command(
        "run or inspect the store that several servers share",
        "Runs the process that reads, checks and caches adapters for all servers of this user on "
        "this machine. Servers start a store automatically, and it exits with the last of them; "
        "one started by hand keeps adapters in host memory between servers, until Ctrl-C. Exits "
        "with 2 if a store is already running, or if there is none to describe.",
        ("store", "store --describe --json"),
    ),
    "plan": Command(
        "compute what adapter slots cost, before a server is started, and what it can carry",
        "Computes, to the byte, how much of a GPU's memory, and so of the KV cache, --max-loras "
        "and --max-lora-rank take, and what the adapters in a directory need. Only the base "
        "model's config.json is read. With --traffic, predicts a server's throughput and "
        "latencies from a calibration on the same machine. Exits with 1 if the given GPU has too "
        "little room, with 2 if the costs cannot be computed.",
        (
            "plan --model ./Llama-3.1-8B --max-loras 32 --max-lora-rank 64 --gpu-memory 80",
            "plan --model config.json --max-loras 16 --max-lora-rank 16 --adapters ./adapters",
            "plan --traffic trace.csv --calibration calibration.json --max-loras 32",
        ),
        "planning.plan_command",
    ),
    "calibrate": Command(
        "measure what steps and loads of a running server cost, for plan --traffic",
        "Sends requests to a server for a minute or two, and writes a file with the time that its "
        "steps take, depending on what is in them, and that loads of adapters take. Exits with 2 "
        "if the server does not answer, or the file cannot be written.",
        (
            "calibrate --max-num-seqs 64 --max-num-batched-tokens 2048 --output calibration.json",
            "calibrate --url http://localhost:8001 --max-num-seqs 16 --max-num-batched-tokens 512",
        ),
    ),
    "validate": Command(
        "check whether adapters can be served over a base model",
        "Checks adapters as the server does when they are registered, without loading the base "
        "model's weights. Exits with 0 if all can be served, with 1 if one cannot, with 2 if the "
        "base model cannot be used.",
        (
            "validate adapters/acme --model ./Llama-3.1-8B --max-lora-rank 64",
            "validate adapters/* --model ./Llama-3.1-8B --json",
        ),
    ),
    COMPLETION: Command(
        "print a shell's completion script for these commands",
        "Prints a script that makes a shell complete commands and flags. Exits with 2 if shtab "
        "is not installed.",
        (
            "completion bash > ~/.local/share/bash-completion/completions/vllm-multilora",
            'completion zsh > "${fpath[1]}/_vllm-multilora"',
        ),
    ),
}


PROGRAM = "vllm-multilora"
_PACKAGE = "vllm_multilora.toolbox.commands"
_USUAL_WIDTH = 80
TRACEBACK = "MULTILORA_TRACEBACK"
NO_ANSWER = 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells have them: 128 and the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 or 2 as its description says, where 2 means that it has no answer."""
    if sys.stdout is None:  # closed by whoever wants no output, and Python opens nothing for it
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Names of folders may have bytes that are no text; Python shows them so on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if argv is None else list(argv)
    # No option that may come before a command takes a value.
    called = [word for word in given if not word.startswith("-")][:1]
    parser = parser_of(COMMANDS if called == [COMPLETION] else called)
    try:
        arguments, unknown = parser.parse_known_args(given)
    except SystemExit:  # help has been printed, or what is wrong
        if status := unwritten():
            return status
        raise
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return status_of(arguments.run, arguments, arguments.parser.prog)


def unwritten() -> int:
    """Writes out what has been printed; the exit status if that cannot be done, else 0."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        return _no_answer(f"{PROGRAM}: error: its output cannot be written: {error}")
    return 0


def _no_answer(why: str) -> int:
    """Says why there is none, if there is room for that; returns the exit status."""
    try:
        print(why, file=sys.stderr)
    except OSError:
        _drop(sys.stderr)
    return NO_ANSWER


def _drop(stream: TextIO) -> None:
    """Has nobody get what is left of a stream, which Python would write at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def status_of(
    run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, name: str
) -> int:
    """Runs a command; where it ends with an error, a sentence that begins with `name` says why."""
    try:
        status = int(run(arguments))
        return unwritten() or status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return unwritten() or PIPE_CLOSED
    except MultiLoRAError as error:
        return _no_answer(f"{name}: error: {error}")
    except Exception as error:  # which would end with 1 otherwise, and that is an answer
        if status := unwritten():
            return status
        if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
            install = f"is not installed: pip install 'vllm-multilora[{_EXTRAS[error.name]}]'"
            return _no_answer(f"{name}: error: {error.name} {install}")
        said, hint = " ".join(f"{type(error).__name__}: {error}".split()), ""
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        else:
            hint = f" (set {TRACEBACK}=1 to see where)"
        return _no_answer(f"{name}: error: {said}{hint}")


def parser_of(called: Container[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the commands that may be called."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Multi-tenant LoRA serving for vLLM.",
        epilog=_shown(command.examples[0] for command in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    width = max(11, shutil.get_terminal_size().columns - 2)  # as of what argparse wraps itself
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=textwrap.fill(command.description, width),
            epilog=_shown(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in called:
            module = importlib.import_module(f"{_PACKAGE}.{command.module or name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser, program=parser)
    return parser


def _shown(examples: Iterable[str]) -> str:
    return "\n".join(("examples:", *(_continued(f"{PROGRAM} {example}") for example in examples)))


def _continued(command: str) -> str:
    """A command in one line, or where a terminal of usual width has too little room, one a flag."""
    line = f"  {command}"
    return line if len(line) <= _USUAL_WIDTH else re.sub(r" (?=--|>)", " \\\n      ", line)


if __name__ == "__main__":
    sys.exit(main())
