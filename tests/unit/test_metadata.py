"""What PyPI shows of the package, and what it lets users install beside it."""

import os
import re
import subprocess
import sys
import tomllib
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/acme/serving"
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = (
    "import sys\n"
    "from setuptools import build_meta\n"
    "folder = sys.argv[1]  # setuptools replaces sys.argv\n"
    "build_meta.prepare_metadata_for_build_wheel(folder)\n"
)


def metadata(folder: Path, repository: str | None) -> Message:
    """The metadata as it is built in a repository of that name, or in none."""
    env = {name: value for name, value in os.environ.items() if name != "GITHUB_REPOSITORY"}
    if repository:
        env["GITHUB_REPOSITORY"] = repository
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = folder.glob("*.dist-info/METADATA")
    return message_from_string(file.read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Message:
    return metadata(tmp_path_factory.mktemp("published"), "acme/serving")


def test_pypi_shows_where_the_project_lives(published: Message) -> None:
    addresses = [line.partition(", ") for line in published.get_all("Project-URL", [])]
    assert {name for name, _, _ in addresses} == {
        "Homepage",
        "Documentation",
        "Changelog",
        "Issues",
    }
    for _, _, address in addresses:
        assert address.startswith(HOME)
        if "/blob/" in address:
            assert (ROOT / address.split("/", 7)[7]).exists()


def test_every_link_of_the_readme_is_absolute_on_pypi(published: Message) -> None:
    links = LINK.findall(str(published.get_payload()))
    assert len(links) > 30
    prefix = f"{HOME}/blob/v{published['Version']}/"
    for link in links:
        assert link.startswith("https://")
        if link.startswith(prefix):
            assert (ROOT / link.removeprefix(prefix).partition("#")[0]).exists()


def test_a_build_outside_of_a_known_repository_names_none(tmp_path: Path) -> None:
    built = metadata(tmp_path, None)
    assert built.get_all("Project-URL") is None
    assert str(built.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_extras_are_what_users_need(published: Message, project: dict[str, Any]) -> None:
    extras = set(published.get_all("Provides-Extra", []))
    assert extras == {"completion", "cpu", "cuda", "demo", "plot", "remote", "signing"}
    assert extras.isdisjoint(project["dependency-groups"])


def test_the_makefile_installs_groups_that_any_pip_understands(project: dict[str, Any]) -> None:
    """`pip install --group` needs pip 25.1, which new environments of Python 3.11 do not have."""
    for group in project["dependency-groups"].values():
        assert [str(Requirement(each)) for each in group]
    makefile = (ROOT / "Makefile").read_text()
    assert "--group" not in makefile.replace("lack --group", "")
    code = re.search(r'^group = \$\$\(\$1 -c "(.*)"\)$', makefile, re.M)
    assert code is not None
    for name, group in project["dependency-groups"].items():
        command = [sys.executable, "-c", code[1].replace("$2", name)]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert shown.stdout.split() == group


@pytest.mark.parametrize("extra", ["cuda", "cpu"])
def test_extras_allow_every_supported_vllm(project: dict[str, Any], extra: str) -> None:
    from vllm_multilora.integration.patching.patch import RUNS

    [allowed] = [
        Requirement(each).specifier
        for each in project["project"]["optional-dependencies"][extra]
        if each.startswith("vllm")
    ]
    minors = {run.partition("/")[0] for run in RUNS}
    assert {minor for minor in minors if f"{minor}.0" in allowed} == minors
    newest = max(int(minor.partition(".")[2]) for minor in minors)
    assert f"0.{newest + 1}.0" not in allowed
