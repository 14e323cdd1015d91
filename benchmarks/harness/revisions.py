"""The same benchmark with two revisions of the plugin, turn by turn.

The other revision is checked out into a folder of its own, with this revision's `benchmarks/` in
place of its own, and each run is a process that imports the plugin and its kernels from there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import results
from benchmarks.harness.registry import Figure
from benchmarks.harness.results import ROOT, Record


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A folder with a revision's files and this one's benchmarks.

    Raises:
        subprocess.CalledProcessError: git knows no such revision.
    """
    with tempfile.TemporaryDirectory(prefix="revision-") as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run_in(tree: Path, words: Sequence[str]) -> Record:
    """Runs a benchmark with a work tree's files, in a process of its own.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        links, file = Path(scratch) / "links", Path(scratch) / "records.jsonl"
        links.mkdir()
        (links / "multilora_kernels").symlink_to(tree / "kernels")
        path = os.pathsep.join([str(links), str(tree)])
        subprocess.run(
            [sys.executable, "-m", "benchmarks", "run", *words, "--json", str(file)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": path},
            stdout=sys.stderr,
            check=True,
        )
        [record] = results.read(file)
    return record


def compare(base: str, words: Sequence[str], pairs: int) -> tuple[list[Figure], list[Record]]:
    """Runs a benchmark with this revision and another one, in turn.

    Args:
        base: The other revision.
        words: Of `python -m benchmarks run`: the benchmark and its options.
        pairs: How often both run.

    Returns:
        Of each figure this revision's median over the other's, by pair; and all records, the other
        revision's with its own commit.
    """
    kept: list[Record] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    with worktree(base) as tree:
        trees = {"base": tree, "here": ROOT}
        for number in range(pairs):
            order = list(trees) if number % 2 == 0 else list(reversed(trees))
            found = {name: run_in(trees[name], words) for name in order}
            kept += found.values()
            medians = {
                name: {(f.case, f.measure): statistics.median(f.values) for f in record.figures}
                for name, record in found.items()
            }
            for key, value in medians["here"].items():
                if medians["base"].get(key):
                    ratios.setdefault(key, []).append(value / medians["base"][key])
    return [
        Figure(case, f"{measure}: here / {base}", values)
        for (case, measure), values in ratios.items()
    ], kept
