"""The wheel and the sdist carry everything, and an installed wheel works from any folder."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = {
    "multilora_kernels/__init__.py",
    "multilora_kernels/README.md",
    "multilora_kernels/py.typed",
    "multilora_kernels/native/segment_gemm.c",
    "vllm_multilora/plugin.py",
    "vllm_multilora/py.typed",
    "vllm_multilora/integration/patching/ledger.py",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist built from a clean export of the sources."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("examples/demo/adapters"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    program = (
        "import sys\n"
        "from setuptools import build_meta\n"
        "folder = sys.argv[1]  # setuptools replaces sys.argv\n"
        "build_meta.build_sdist(folder)\n"
        "build_meta.build_wheel(folder)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=source, check=True, capture_output=True
    )
    return folder


def test_the_wheel_holds_sources_and_data(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= NEEDED
    own = {n for n in names if ".dist-info/" not in n}
    assert all(n.startswith(("multilora_kernels/", "vllm_multilora/")) for n in own)
    every = {
        target + str(f.relative_to(ROOT / folder))
        for folder, target in (
            ("kernels", "multilora_kernels/"),
            ("vllm_multilora", "vllm_multilora/"),
        )
        for pattern in ("*.py", "*.c", "*.h", "*.json")
        for f in (ROOT / folder).rglob(pattern)
    }
    assert every <= names


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "kernels/native/segment_gemm.c"} <= names


def test_an_unpacked_wheel_works_from_another_folder(built, tmp_path):
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import multilora_kernels, sys, torch\n"
        "assert multilora_kernels.__file__.startswith(sys.argv[1])\n"
        "plan = multilora_kernels.BatchPlan.build([0], 1)\n"
        "y, one = torch.zeros(1, 8), torch.ones\n"
        "multilora_kernels.lora_linear(y, one(1, 8), [one(1, 2, 8)], [one(1, 8, 2)],\n"
        "    torch.tensor([[2]], dtype=torch.int32), plan, backend='native')\n"
        "print(y[0, 0].item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(tmp_path / "site"),
            "PATH": "/usr/bin:/bin",
            "MULTILORA_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "16.0", done.stderr
