"""Compiled kernels that a layer keeps are those that Triton would have found.

Triton's binding, specialisation and caches run for real, in a process without its interpreter;
compiler and driver are stand-ins (`tools/kernels/measure/compiled/without_card.py`).
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled.compiled_launches"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kept_launches_are_those_that_triton_finds(found):
    assert found["differ"] == []


def test_nothing_is_compiled_once_every_range_of_token_counts_has_been_seen(found):
    assert found["compiled_late"] == [0, 0]


def test_wherever_activations_lie_nothing_is_looked_up_or_compiled_in_a_range_seen_before(found):
    """(launches that Triton looked up, kernels it has compiled) of a layer and its halves.

    Once more all are looked up by Triton: what was kept must be what it finds.
    """
    late = found["looked_up_late"]
    assert len(late) == 12
    assert {name: found for name, found in late.items() if found != [0, 0]} == {}


def test_the_warm_up_compiles_all_that_filling_slots_launches(found):
    scatter = found["scatter"]
    assert scatter["warmed"] == scatter["kinds"] == 3
    assert scatter["late"] == 0


def test_filling_a_slot_keeps_few_programs_in_the_way_of_a_steps_kernels(found):
    """A program for 8 KiB or a piece, not sixteen for every piece however small."""
    group = 4 << 20
    assert found["scatter"]["most programs"] <= group // 8192 + 8


def test_filling_a_slot_allocates_nothing(found):
    """All of the device's memory belongs to the KV cache by then; the last one is the check's."""
    assert found["scatter"]["allocations"] == ["aten.zeros.default"]
