"""The pages for people: links lead somewhere, and what is made of the code is up to date."""

import argparse
import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from tools import pages
from vllm_multilora.cli import COMMANDS, parser_of
from vllm_multilora.config import MultiLoRAConfig, flag_of
from vllm_multilora.integration.settings.flags import add_flags

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
HEADING = re.compile(r"^#+ (.+)$", re.M)
MAX_LINES = 120  # of the README


def written() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


PAGES = written()


@cache
def anchors(page: Path) -> frozenset[str]:
    """The names of a page's headings, as they are in links."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    return frozenset(re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", sorted(pages.DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_tables_are_those_of_the_code(page: Path) -> None:
    assert pages.filled(page.read_text()) == page.read_text(), "run python -m tools.pages"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_the_plugin_exist(page: Path) -> None:
    flags = {flag_of(setting.name) for setting in fields(MultiLoRAConfig)}
    named = set(re.findall(r"--(?:no-)?multilora(?:-[a-z]+)*", page.read_text()))
    assert {flag.replace("--no-", "--", 1) for flag in named} <= flags


FLAGS_OF_OTHERS = {
    *("--editable", "--extra-index-url", "--no-deps", "--yes"),
    *("--ipc", "--recursive", "--shm-size", "--times"),
    *("--base", "--card", "--dry-run", "--rehearse", "--vllm"),
}
"""Flags of pip, Docker and rsync, and of this project's tools."""


@pytest.fixture(scope="module")
def flags_of_vllm() -> set[str]:
    """Flags of `vllm serve`."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return flags_in(make_arg_parser(FlexibleArgumentParser()))


def flags_in(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def texts() -> Iterator[tuple[Path, str]]:
    """What the code says, to people or to itself, and what the pages say of this server."""
    for path in (ROOT / "vllm_multilora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if page.name != "migrating.md":
            yield page, page.read_text()


def test_flags_that_messages_and_pages_name_exist(flags_of_vllm: set[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    known = FLAGS_OF_OTHERS | flags_of_vllm | flags_in(parser) | flags_in(parser_of(()))
    for name, command in COMMANDS.items():
        words = shlex.split(command.examples[0].partition(">")[0])
        known |= flags_in(parser_of([name]).parse_args(words).parser)
    store = (ROOT / "vllm_multilora/store/__main__.py").read_text()
    known |= set(re.findall(r'"(--[a-z-]+)"', store))
    flag = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])")
    named = {(name, path.name) for path, text in texts() for name in flag.findall(text)}
    assert {each for each in named if each[0] not in known} == set()


def test_flags_in_the_guide_for_migration_exist(flags_of_vllm: set[str]) -> None:
    """Flags in the right-hand columns, which are this server's."""
    rows = re.findall(r"^\|.*\|(.*)\|$", (pages.DOCS / "migrating.md").read_text(), re.M)
    reported = {flag for row in rows for flag in re.findall(r"--[a-z][a-z-]*", row)}
    assert len(reported) > 15
    assert {flag for flag in reported if "multilora" not in flag} <= flags_of_vllm


def test_the_site_has_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Leaves out the functions that MkDocs is told of."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    sections = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    named = [
        page if isinstance(page, str) else next(iter(page.values()))
        for section in sections
        for listed in section.values()
        for page in listed
    ]
    assert sorted(named) == sorted(str(page.relative_to(ROOT)) for page in PAGES)


def test_the_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= MAX_LINES
    missing = [page.name for page in pages.DOCS.glob("*.md") if f"(docs/{page.name})" not in readme]
    assert not missing


NAMED_IN = {
    "kernels": (
        *("kernels/*.py", "kernels/batch/*.py", "kernels/launches/*.py", "kernels/packs/*.py"),
        *("kernels/native/sources/*.[ch]", "kernels/native/*.py"),
    ),
    "kernels/triton": ("kernels/triton/**/*.py",),
    "tools/testbed": ("tools/testbed/*.py", "tools/testbed/*.sh"),
    "vllm_multilora/integration": ("vllm_multilora/integration/**/*.py",),
    "vllm_multilora/store": ("vllm_multilora/store/**/*.py",),
}
"""The folders whose README says what is in each file."""


@pytest.mark.parametrize("folder", NAMED_IN)
def test_a_folder_s_readme_names_its_files(folder: str) -> None:
    named = set(re.findall(r"`(?:[\w.]+/)*([\w.]+)`", (ROOT / folder / "README.md").read_text()))
    files = {path for pattern in NAMED_IN[folder] for path in ROOT.glob(pattern)}
    missing = {path.name for path in files if not {path.name, path.stem} & named}
    assert missing <= {"__init__.py"}


@pytest.mark.parametrize("folder", NAMED_IN)
def test_a_folder_s_readme_names_no_file_that_is_not_there(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    for name in re.findall(r"`([\w./]+\.(?:py|c|h|sh))`", text):
        below = ("kernels", "tests", "tools", "vllm_multilora")
        found = (path for top in below for path in (ROOT / top).glob(f"**/{name}"))
        assert (ROOT / name).exists() or (ROOT / folder / name).exists() or any(found), name


def test_every_environment_variable_that_users_set_is_described():
    between_processes = {
        *("MULTILORA_API_SERVERS", "MULTILORA_CACHE_SALT", "MULTILORA_FILL_LINK"),
        *("MULTILORA_METRICS_FOLDER", "MULTILORA_RUNTIME_UPDATING", "MULTILORA_SERVER"),
        "MULTILORA_CREDENTIALS_FD",
    }
    read = {
        name
        for folder in ("vllm_multilora", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'"(MULTILORA_[A-Z_]+)"', path.read_text())
    }
    described = set(
        re.findall(r"^\| `(MULTILORA_\w+)`", (ROOT / "docs/settings.md").read_text(), re.M)
    )
    assert described == read - between_processes
