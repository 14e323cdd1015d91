"""The C code on processors with fewer vector instructions than this one.

Each build leaves some out; the tests of products and packing then run on it in a process of
their own.
On a processor that lacks them anyway a build is the same as a smaller one, and passes as well.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_OUT = {
    "no-avx512-bf16": "-mno-avx512bf16",
    "no-avx512": "-mno-avx512f",
    "no-avx": "-mno-avx -mno-avx2 -mno-fma -mno-f16c",
}


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the sets are those of x86 processors"
)
@pytest.mark.parametrize("flags", LEFT_OUT.values(), ids=LEFT_OUT)
@pytest.mark.parametrize(
    ("tests", "library"), [("test_lora_linear.py", "kernels"), ("test_packing.py", "packing")]
)
def test_results_are_right_with_fewer_instructions(tests, library, flags, tmp_path):
    environment = os.environ | {
        "CC": f"{os.environ.get('CC', 'gcc')} {flags}",
        "MULTILORA_CACHE_DIR": str(tmp_path),
    }
    path = Path(__file__).with_name(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        [*command, "-k", "native"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert list(tmp_path.glob(f"{library}-*.so"))
