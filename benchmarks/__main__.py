"""Lists, runs and reports benchmarks.

    python -m benchmarks list
    python -m benchmarks run NAME ... [OPTION=VALUE ...] [--quick] [--json FILE] [--base REV]
    python -m benchmarks report

`run` prints each benchmark's figures; `--json` adds them to a file of records. With `--base` the
same benchmark runs with this revision of the plugin and with another one, turn by turn, and what is
printed are ratios. `report` fills the tables and plots of docs/benchmarks.md from
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import registry, report, results, revisions
from benchmarks.harness.registry import Benchmark
from benchmarks.harness.tables import table

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="which benchmarks there are, and what their options are")
    run = commands.add_parser("run", help="run benchmarks")
    run.add_argument("words", nargs="+", metavar="NAME | OPTION=VALUE")
    run.add_argument("--quick", action="store_true", help="short, to see that they work")
    run.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    run.add_argument("--base", metavar="REV", help="compare with this revision")
    run.add_argument("--pairs", type=int, default=3, help="of runs, with --base")
    commands.add_parser("report", help="fill docs/benchmarks.md")
    arguments, late = parser.parse_known_args(words)
    if arguments.command == "run":  # argparse takes no words after flags
        arguments.words += [word for word in late if not word.startswith("-")]
        late = [word for word in late if word.startswith("-")]
    if late:
        parser.error(f"there is no {late[0]}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        if arguments.command == "list":
            show(listed())
        elif arguments.command == "report":
            report.write()
        else:
            return run_all(arguments)
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def show(text: str) -> None:
    """Prints a text, for a reader who may have seen enough before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would write what is left at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listed() -> str:
    """All benchmarks, for people."""
    lines = []
    for name in registry.names():
        found = registry.named(name)
        options = " ".join(f"{option}={value}" for option, value in found.options.items())
        lines.append(f"{name}: {found.about}\n    {options}".rstrip())
    return "\n".join(lines)


def run_all(arguments: argparse.Namespace) -> int:
    """Runs the named benchmarks one after another, each in a process of its own."""
    chosen = [registry.named(word) for word in arguments.words if "=" not in word]
    texts = [word for word in arguments.words if "=" in word]
    if not chosen:
        raise ValueError("name a benchmark; `python -m benchmarks list` shows them")
    for one in chosen:
        one.parse(texts)
    if len(chosen) == 1 and not arguments.base:
        return run_here(chosen[0], texts, arguments.quick, arguments.json)
    for one in chosen:
        words = [one.name, *texts, *(["--quick"] if arguments.quick else [])]
        if arguments.base:
            figures, records = revisions.compare(arguments.base, words, arguments.pairs)
            print(f"\n{one.name}\n\n{table(figures)}")
            for record in records if arguments.json else ():
                results.append(record, arguments.json)
        else:
            if arguments.json:
                words += ["--json", str(arguments.json)]
            subprocess.run([sys.executable, "-m", "benchmarks", "run", *words], check=True)
    return 0


def run_here(chosen: Benchmark, texts: Sequence[str], is_quick: bool, file: Path | None) -> int:
    """Runs a benchmark in this process."""
    options = (dict(chosen.quick) if is_quick else {}) | chosen.parse(texts)
    began = datetime.now(UTC)
    figures = list(chosen.measure(**options))
    print(f"\n{chosen.name}\n\n{table(figures)}")
    if file:
        results.append(results.Record.of(chosen.name, options, began, figures), file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
