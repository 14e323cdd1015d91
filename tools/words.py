"""Counts what makes this repository hard to read; `python -m tools.words` lists it.

Three kinds, all at zero:

- docstrings, also those of attributes and constants, that only make sense after the name above
  them: they begin with "Of", "That", "Those" or "Whose";
- sentences of more than 35 words in the README, the docs and all other pages;
- names with a word of this house's own where the field has one, such as `MOST_BYTES` for
  `MAX_BYTES`. `words.json` lists those that are left, and may only shrink.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "words.json"
MAX_SENTENCE_WORDS = 35

ROOT = Path(__file__).parents[1]

_LEANING = re.compile(r"\s*(?:Of|That|Those|Whose)\b")

# Not code blocks, figures and tables that are generated from records and code, and comments.
_LEFT_OUT = re.compile(
    r"^[ ]*```.*?^[ ]*```|<!-- (?:figures|table): .*?<!-- end -->|<!--.*?-->", re.M | re.S
)
_TARGET = re.compile(r"\]\([^)\s]*\)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
# What follows a colon or a semicolon can be read by itself, as a sentence can.
_END = re.compile(r"(?<=[.!?:;])[*_)\"]*\s+")
_WORD = re.compile(r"\S*\w\S*")

# "Most", "least" and "taken" are plain words in a name such as `at_least`; as the first word of a
# constant or a class they are a limit and a result. A GPU's and a processor's lanes are called so.
_NAME = re.compile(
    r"(?:^|_)(?:wants?|wanted|asides?|party|parties|desks?|doors?|told)(?:_|$)"
    r"|(?:^|_)(?:WANTS?|WANTED|ASIDES?|PARTY|PARTIES|DESKS?|DOORS?|TOLD|MOST|LEAST|TAKEN)(?:_|$)"
    r"|(?:Wants?|Wanted|Asides?|Party|Parties|Desks?|Doors?|Told|Most|Least|Taken)(?=[A-Z]|$)"
)
_NAME_OUTSIDE_KERNELS = re.compile(r"(?:^|_)lanes?(?:_|$)|(?:^|_)hubs?$|Lanes?(?=[A-Z]|$)|^Hub")
_KERNELS = ("kernels/", "tools/kernels/", "tests/kernels/", "tests/tools/")
_IN_C = re.compile(r"/\*.*?\*/|//[^\n]*|\"[^\"\n]*\"|(\b[A-Za-z_]\w*)", re.S)


def tracked_files(*suffixes: str) -> list[str]:
    """Files of the repository with one of some suffixes, without those that Git ignores."""
    patterns = [f"*{suffix}" for suffix in suffixes]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if (ROOT / name).is_file())


def leaning_docstrings() -> Iterator[tuple[str, int, str]]:
    """Docstrings that do not stand by themselves: file, line and first line of the text."""
    for name in tracked_files(".py"):
        for node in _nodes((ROOT / name).read_text()):
            match node:
                case ast.Expr(ast.Constant(str(text))) if _LEANING.match(text):
                    yield name, node.lineno, text.strip().split("\n")[0]


def long_sentences() -> Iterator[tuple[str, int, str]]:
    """Sentences with more words than `MAX_SENTENCE_WORDS`: page, number of words and text."""
    for name in tracked_files(".md"):
        for sentence in sentences((ROOT / name).read_text()):
            words = len(_WORD.findall(sentence))
            if words > MAX_SENTENCE_WORDS:
                yield name, words, sentence


def sentences(page: str) -> Iterator[str]:
    """The sentences of a page in Markdown; each cell of a table is read by itself."""
    block: list[str] = []
    for line in [*_LEFT_OUT.sub("", page).split("\n"), ""]:
        text = line.strip()
        if not text or text.startswith(("#", "|")) or _ITEM.match(text):
            yield from _END.split(_TARGET.sub("]", " ".join(block)))
            block = []
        if text.startswith("|"):
            for cell in text.strip("|").split("|"):
                yield from _END.split(_TARGET.sub("]", cell.strip()))
        elif text and not text.startswith("#"):
            block.append(text)


def own_names() -> dict[str, int]:
    """Names with a word of this house's own, and how many definitions each has."""
    found: Counter[str] = Counter()
    for name in tracked_files(".py", ".c", ".h"):
        text = (ROOT / name).read_text()
        defined = _defined(text) if name.endswith(".py") else _IN_C.findall(text)
        in_kernels = name.startswith(_KERNELS)
        for each in {Path(name).stem, *defined}:
            if _NAME.search(each) or (not in_kernels and _NAME_OUTSIDE_KERNELS.search(each)):
                found[each] += 1
    return dict(sorted(found.items()))


def kept() -> list[str]:
    """The names that `words.json` still allows."""
    names: list[str] = json.loads(FILE.read_text())
    return names


@cache
def _nodes(text: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse(text))]


def _defined(text: str) -> set[str]:
    """Classes, functions, parameters, attributes and variables that a module defines."""
    found = set()
    for node in _nodes(text):
        match node:
            case ast.ClassDef(name=each) | ast.FunctionDef(name=each):
                found.add(each)
            case ast.AsyncFunctionDef(name=each) | ast.arg(arg=each):
                found.add(each)
            case ast.Name(id=each, ctx=ast.Store()) | ast.Attribute(attr=each, ctx=ast.Store()):
                found.add(each)
            case ast.alias(asname=str(each)):
                found.add(each)
    return found


def main() -> int:
    """Prints everything that is counted; returns 1 if anything must be rewritten."""
    parser = argparse.ArgumentParser(prog="python -m tools.words")
    parser.add_argument("--lower", action="store_true", help="drop names that are gone")
    lower = parser.parse_args().lower
    docstrings, long, names = [*leaning_docstrings()], [*long_sentences()], own_names()
    allowed = kept()
    if lower:
        allowed = [name for name in allowed if name in names]
        FILE.write_text(json.dumps(allowed, indent=1) + "\n")
    new = [name for name in names if name not in allowed]
    for file, line, text in docstrings:
        print(f"{file}:{line}: say what it is: {text}")
    for page, words, text in long:
        print(f"{page}: {words} words in a sentence: {text}")
    for name in new:
        print(f"{name}: use the field's word")
    print(f"docstrings that do not stand by themselves {len(docstrings):5}")
    print(f"sentences over {MAX_SENTENCE_WORDS} words {len(long):20}")
    print(f"names with words of our own {len(names):20}, {len(allowed)} allowed")
    return int(bool(docstrings or long or new))


if __name__ == "__main__":
    sys.exit(main())
