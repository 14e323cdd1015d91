"""Where Triton cannot be had, or is in the wrong mode, the backend says so and what to do."""

import os
import subprocess
import sys

import pytest

from multilora_kernels import TritonUnavailableError, resolve_backend, triton_availability
from multilora_kernels import triton as backend


def test_on_a_cpu_the_backend_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(triton_availability, "_language_is_interpreted", lambda: False)
    with pytest.raises(TritonUnavailableError, match="TRITON_INTERPRET=1 must be set before"):
        triton_availability.require("cpu")


@pytest.mark.parametrize(
    ("at_first", "later", "device"),
    [
        pytest.param("0", "1", "cpu", id="set"),
        pytest.param("1", "0", "cuda", id="unset", marks=pytest.mark.slow),
    ],
)
def test_a_mode_that_changed_after_triton_was_imported_is_refused(at_first, later, device):
    """Triton's own functions would be in one mode and these kernels in the other."""
    script = (
        "import os, triton.language\n"
        f"os.environ['TRITON_INTERPRET'] = '{later}'\n"
        "from multilora_kernels import triton_availability as here\n"
        "try:\n"
        f"    here.require('{device}')\n"
        "except here.TritonUnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": at_first}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    ours, tritons = "these kernels were", "Triton itself was"
    one, other = (ours, tritons) if later == "1" else (tritons, ours)
    assert f"{one} imported with TRITON_INTERPRET=1 and {other} without it" in done.stdout
    assert "before anything imports Triton" in done.stdout


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_availability, "is_installed", lambda: False)
    with pytest.raises(TritonUnavailableError, match="pip install 'triton"):
        triton_availability.require("cuda")
    assert resolve_backend("auto", "cuda") == "torch"


def test_a_device_that_triton_does_not_know_is_refused():
    with pytest.raises(ValueError, match="not on meta"):
        resolve_backend("triton", "meta")
