"""The C code on processors with fewer vector instructions than this one.

It is built for each set of instructions, as in wheels; the tests of products and packing then run
on it in a process of their own. The best set is the one that they run on anyway.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from multilora_kernels.native import builds, processor

SETS = [each.name for each in builds.instruction_sets(platform.machine())]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS[1:])
@pytest.mark.parametrize(
    ("tests", "library"),
    [
        (
            ("test_lora_linear.py", "native/test_native_base.py", "native/test_native_memory.py"),
            "kernels",
        ),
        (("packs/test_packing.py",), "packing"),
        (("experts",), "kernels"),
    ],
    ids=["kernels", "packing", "experts"],
)
def test_results_are_right_with_fewer_instructions(tests, library, name, tmp_path):
    if SETS.index(name) <= SETS.index(processor.chosen_set().name):
        pytest.skip("this processor has no more than these, or not even these")
    environment = os.environ | {
        "MULTILORA_INSTRUCTIONS": name,
        "MULTILORA_CACHE_DIR": str(tmp_path),
    }
    paths = [str(Path(__file__).parents[1] / file) for file in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(
        [*command, "-k", "native or experts"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert list(tmp_path.glob(f"{library}-{name}-*.so"))
