"""Folders have few files, and a name stands for one thing in the whole product."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("vllm_multilora", "kernels", "tools", "benchmarks", "tests")
PRODUCT = ("vllm_multilora", "kernels")
MAX_FILES = 16
"""Files of code in a folder, `__init__.py` included: more are not taken in at a glance."""
SUFFIXES = {".py", ".c", ".h"}


def files_of(room: str) -> list[Path]:
    return sorted(file for file in (ROOT / room).rglob("*") if file.suffix in SUFFIXES)


@pytest.mark.parametrize("room", ROOMS)
def test_no_folder_has_more_than_16_modules(room):
    by_folder = defaultdict(list)
    for file in files_of(room):
        by_folder[file.parent.relative_to(ROOT)].append(file.name)
    assert {f: len(names) for f, names in by_folder.items() if len(names) > MAX_FILES} == {}


def test_no_two_modules_of_the_product_have_the_same_name():
    by_name = defaultdict(list)
    for room in PRODUCT:
        for file in files_of(room):
            if file.suffix == ".py" and not file.stem.startswith("__"):
                by_name[file.stem].append(str(file.relative_to(ROOT)))
    assert {name: found for name, found in by_name.items() if len(found) > 1} == {}


def test_no_two_public_classes_of_the_product_have_the_same_name():
    by_name = defaultdict(list)
    for room in PRODUCT:
        for file in files_of(room):
            tree = ast.parse(file.read_text()) if file.suffix == ".py" else ast.Module([], [])
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    by_name[node.name].append(str(file.relative_to(ROOT)))
    assert {name: found for name, found in by_name.items() if len(found) > 1} == {}
