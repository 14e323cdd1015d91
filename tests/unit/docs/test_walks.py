"""The walks through the code in docs/architecture.md name functions that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/architecture.md").read_text()
SECTION = TEXT.partition("## Two walks through the code\n")[2].partition("\n## ")[0]
HOP = re.compile(r"^\| (\d+) \| `([\w.]+)` \| `([\w/]+\.py)` \| .+ \|$", re.MULTILINE)
WALKS = [HOP.findall(table) for table in SECTION.split("| hop |")[1:]]
WORDS = re.findall(r"^\| ([a-z ]+) \| .+ \|$", SECTION.rpartition("| word |")[2], re.MULTILINE)


def defined_in(file: str) -> set[str]:
    """Functions of a module and methods of its classes, as `name` and `Class.name`."""
    path = ROOT / file if file.startswith("kernels/") else ROOT / "vllm_multilora" / file
    names = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        names |= {f"{prefix}{each.name}" for each in inner if isinstance(each, functions)}
    return names


@pytest.mark.parametrize(("which", "most"), [(0, 12), (1, 30)], ids=["name", "load"])
def test_a_walk_is_short_and_each_hop_is_there(which, most):
    walk = WALKS[which]
    assert [int(number) for number, _, _ in walk] == list(range(1, len(walk) + 1))
    assert 0 < len(walk) <= most
    missing = [(name, file) for _, name, file in walk if name not in defined_in(file)]
    assert not missing


def test_each_word_of_the_walks_is_explained_once():
    marked = re.findall(r"[^*]\*([a-z ]+)\*[^*]", SECTION)
    assert sorted(WORDS) == sorted(marked) == sorted(set(marked))
