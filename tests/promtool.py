"""Prometheus' own checks, by its command `promtool`."""

import os
import shutil
import subprocess

import pytest

REQUIRED = "MULTILORA_REQUIRE_PROMTOOL"


def run_promtool(*arguments: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs promtool; skips the test where it is missing and not required.

    Args:
        *arguments: Of promtool.
        text: Its standard input.
    """
    command = shutil.which("promtool")
    if command is None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"promtool is not on the path, and {REQUIRED}=1 asks for it")
        pytest.skip("promtool is not on the path")
    return subprocess.run(
        [command, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
