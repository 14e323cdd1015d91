"""The wheel holds what users run, and runs without a compiler; the sdist is what it is built from.

With `MULTILORA_DIST` the wheel and the sdist in that folder are looked at, else new ones are built.
"""

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from multilora_kernels.native import builds
from vllm_multilora import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = {"kernels": "multilora_kernels", "vllm_multilora": "vllm_multilora"}
SETS = builds.instruction_sets(platform.machine())
LIBRARIES = {
    f"multilora_kernels/native/{library.file_name(each)}"
    for library in builds.LIBRARIES
    for each in SETS
}

COMPUTE = """
import ctypes, json, pathlib, torch, multilora_kernels
from multilora_kernels import native
plan = multilora_kernels.BatchPlan.build([0], 1)
y, one = torch.zeros(1, 8), torch.ones
multilora_kernels.lora_linear(y, one(1, 8), [one(1, 2, 8)], [one(1, 8, 2)],
    torch.tensor([[2]], dtype=torch.int32), plan, backend="native")
paths = [native.load_library()._name, native.load_packing_library()._name]
for path in pathlib.Path(paths[0]).parent.glob("*.so"):
    ctypes.CDLL(str(path))
print(json.dumps([y.tolist(), paths]))
"""


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def build(what: str, source: Path, folder: Path) -> None:
    program = (
        "import sys\n"
        "from setuptools import build_meta\n"
        "what, folder = sys.argv[1:]  # setuptools replaces sys.argv\n"
        "getattr(build_meta, f'build_{what}')(folder)\n"
    )
    command = [sys.executable, "-c", program, what, str(folder)]
    done = subprocess.run(command, cwd=source, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with an sdist of the sources and the wheel that is built from it."""
    if given := os.environ.get("MULTILORA_DIST"):
        return Path(given).resolve()
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in tracked():
        if not name.startswith(("examples/", "tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build("sdist", source, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path_factory.mktemp("sdist"), filter="data")
    build("wheel", next((tmp_path_factory.getbasetemp() / "sdist0").iterdir()), folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    [path] = (p for p in dist.glob("*.whl") if p.stem.endswith(platform.machine()))
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, which sees this one's packages; the folder of its commands."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    subprocess.run(
        [*command, "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)],
        check=True,
    )
    return folder / "bin"


@pytest.fixture
def run(installed, tmp_path):
    """Runs a command of that environment; no compiler is on the path, and the home is empty."""

    def run(name: str, *arguments: str, home: Path = tmp_path / "home") -> str:
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            [installed / name, *arguments],
            cwd=tmp_path,
            env={"PATH": str(installed), "HOME": str(home), "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_wheel_holds_what_users_run_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    metadata = f"vllm_multilora-{__version__}.dist-info/"
    assert {n for n in names if not n.startswith(metadata)} == LIBRARIES | {
        target + name.removeprefix(source)
        for source, target in PACKAGES.items()
        for name in tracked(
            f"{source}/*.py", f"{source}/*.json", f"{source}/*.html", f"{source}/py.typed"
        )
    }
    assert {n.removeprefix(metadata) for n in names if n.startswith(metadata)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


@pytest.mark.slow
def test_the_wheel_is_for_one_kind_of_machine_and_every_python(wheel):
    assert re.fullmatch(r".*-py3-none-(many)?linux.*_" + platform.machine(), wheel.stem)
    text = zipfile.ZipFile(wheel).read(f"vllm_multilora-{__version__}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in text


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(dist):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert names >= {"pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md"}
    folders = ("kernels/native/sources", "kernels/experts/sources")
    assert names >= set(tracked(*(f"{folder}/*.{each}" for folder in folders for each in "ch")))


@pytest.mark.slow
def test_the_libraries_need_an_old_glibc_and_nothing_else(wheel, tmp_path):
    """So that every Linux of the last ten years has it; OpenMP is PyTorch's."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for name in LIBRARIES:
        shown = subprocess.run(
            ["readelf", "--dynamic", "--version-info", "--wide", tmp_path / name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert set(re.findall(r"Shared library: \[(.*)\]", shown)) <= {"libc.so.6"}
        for version in re.findall(r"Name: (\S+)", shown):
            library, _, number = version.partition("_")
            assert library == "GLIBC", (name, version)
            assert tuple(map(int, number.split("."))) <= (2, 17), (name, version)


@pytest.mark.slow
def test_an_installed_wheel_computes_natively_without_a_compiler_or_a_cache(
    installed, run, tmp_path
):
    values, paths = json.loads(run("python", "-c", COMPUTE))
    assert values == [[16.0] * 8]
    for path in paths:
        assert Path(path).is_relative_to(installed.parent)
        assert Path(path).name in {Path(each).name for each in LIBRARIES}
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_vllm_sees_an_installed_wheel(installed, run):
    assert run("vllm-multilora", "--version").strip() == __version__
    shown = run("vllm-multilora", "doctor")
    assert f"native ({installed.parent}" in shown
    assert "Ready: vllm serve" in shown


@pytest.mark.slow
def test_pip_finds_nothing_amiss_with_it(installed):
    command = [sys.executable, "-m", "pip", "--python", str(installed / "python"), "check"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert not [line for line in shown.splitlines() if "vllm-multilora" in line]


@pytest.mark.slow
def test_the_image_is_built_with_the_right_of_two_wheels(wheel, installed, tmp_path):
    """The Dockerfile's commands, in an environment that has what they would fetch."""
    text = (ROOT / "examples/docker/Dockerfile").read_text().replace("\\\n", "")
    commands = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    dist, programs, python = tmp_path / "dist", tmp_path / "bin", installed / "python"
    dist.mkdir()
    programs.mkdir()
    other = {"x86_64": "aarch64"}.get(platform.machine(), "x86_64")
    for name in (wheel.name, wheel.name.replace(platform.machine(), other)):
        (dist / name).write_bytes(wheel.read_bytes())
    pip = f'#!/bin/sh\nexec {sys.executable} -m pip --python {python} "$@"\n'
    (programs / "pip").write_text(pip)
    (programs / "pip").chmod(0o755)
    env = {"PATH": f"{programs}:{installed}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    shown = ""
    for command in commands:  # the first one must not take the sources, which are seen there, too
        shown += subprocess.run(
            ["sh", "-ec", command.replace("/tmp/dist", str(dist))],
            env=env | ({"PIP_IGNORE_INSTALLED": "1"} if "--no-deps" in command else {}),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
    assert f"Processing {dist / wheel.name}" in shown
    for name in ("cryptography", "model-signing", "pyopenssl"):
        assert f"Requirement already satisfied: {name}" in shown
    assert shown.endswith(f"{__version__}\n")


def test_the_release_workflow_runs_what_anyone_can_run():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    lines = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = {line.removeprefix("make ") for line in lines if line.startswith("make ")}
    assert {"dist", "dist-check"} <= called <= targets
