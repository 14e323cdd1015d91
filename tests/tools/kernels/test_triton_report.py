"""The kernels compile for GPUs that are not here: no spills, wide loads, tensor cores, no races."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tools.kernels.measure.tuned.launch_cases import (
    CARDS,
    CASES,
    SHARED_MEMORY_LIMIT,
    LaunchCase,
    launches,
)

ROOT = Path(__file__).parents[3]
ONE = ("qkv decode, R 64, T 64",)
CROWDED = ("qkv invariant, high rank",)
# What has most in registers, or fewest places to load from at once: where others spill, too, only
# `python -m tools.kernels.report` shows.
TIGHT = (
    "K of whole loads only",
    "down 8B invariant",
    "gate-up 8B mixed",
    "o mixed",
    "qkv decode fp32",
    "qkv fp32, invariant",
    "qkv invariant",
    "qkv prefill fp32",
    "qkv prefill, fp32 adapters",
    "qkv prefill, high rank",
)
BY_TITLE = {case.title: case for case in CASES}
# Where not every row begins where a wide access may, and Triton cannot know which do.
NARROW = {
    "K of whole loads only": {"x", "y"},
    "odd sides and rank": {"x", "y", "planes", "slices"},
    "qkv decode by rows": {"x", "planes"},  # one row is less than 16 bytes for each thread
}
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def report(*arguments: str) -> list[dict]:
    """The report of a process of its own: this one may have Triton in interpreter mode."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.report", "--json", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((ONE, ("90",)), id="one"),
        pytest.param((ONE, ("89", "120")), id="small-cards", marks=pytest.mark.slow),
        pytest.param((CROWDED, ("80", "100", "120")), id="crowded", marks=pytest.mark.slow),
        pytest.param((None, ("90",)), id="all", marks=pytest.mark.slow),
        pytest.param((TIGHT, ("80", "100", "120")), id="tight", marks=pytest.mark.slow),
    ],
)
def asked_for(request) -> tuple[list[LaunchCase], tuple[str, ...]]:
    """The cases and the architectures."""
    requested, architectures = request.param
    return [c for c in CASES if requested is None or c.title.startswith(requested)], architectures


@pytest.fixture(scope="module")
def compiled(asked_for) -> list[dict]:
    cases, architectures = asked_for
    arguments = [f"--arch={each}" for each in architectures]
    return report(*arguments, *(f"--case={case.title}" for case in cases))


def test_everything_asked_for_was_compiled(asked_for, compiled):
    kernels = defaultdict(list)
    for result in compiled:
        kernels[result["architecture"], result["case"]].append(result["kernel"])
    cases, architectures = asked_for
    assert kernels.keys() == {(a, case.title) for a in architectures for case in cases}
    for found in kernels.values():
        assert found in (["shrink", "expand"], ["shrink", "combine", "expand"])


def test_nothing_spills_and_every_program_fits_every_card(compiled):
    """A multiprocessor holds all the programs that it is given.

    Nothing is atomic, and no product reads registers while the program goes on: what Triton before
    3.9 brings to make machine code may use them for something else then.
    """
    for result in compiled:
        assert result["spilled_bytes"] == 0, result
        assert result["registers"] <= 255, result
        assert result["shared_bytes"] <= SHARED_MEMORY_LIMIT, result
        assert 0 < result["per_processor"] <= result["resident"], result
        assert (result["atomics"], result["in_flight"]) == (0, 0), result


def test_tensors_are_read_and_written_16_bytes_at_a_time(compiled):
    """What a thread has less of than 16 bytes, in a narrow body's block, it moves at once."""
    for result in compiled:
        case = BY_TITLE[result["case"]]
        excepted = NARROW.get(case.name, set())
        for tensor, sizes in (*result["loads"].items(), *result["stores"].items()):
            share = shares(result, case).get(tensor)
            if share is None:
                assert tensor in ("plan", "ranks", "marks", "factors", "bias"), result
                assert tensor in ("factors", "bias") or sizes.keys() == {"4"}, result
            elif not any(tensor.endswith(name) for name in excepted):
                assert min(map(int, sizes)) >= min(16, *share), (tensor, result)
                narrow = sum(count for size, count in sizes.items() if int(size) < 16)
                parts = result["constants"]["SPLIT_K"] if tensor == "planes" else 1
                # The first block and the next one; those of a loop over blocks of ranks, twice.
                assert narrow <= 4 * parts * sum(n < 16 for n in share), (tensor, result)


def shares(result: dict, case: LaunchCase) -> dict[str, list[int]]:
    """By tensor, the bytes that a thread has of a block, for each body from 16 ranks on."""
    own, threads = result["constants"], result["threads"]
    item = {tensor: ITEM_BYTES.get(kind, 0) for tensor, kind in result["types"].items()}
    bodies = [16 << i for i in range(5) if 16 << i <= own.get("BLOCK_R", 0)]
    rows = own["BLOCK_M"]
    if result["kernel"] == "combine":
        return {name: [rows * own["BLOCK_N"] * item[name] // threads] for name in ("h", "planes")}
    share = {"planes": [rows * body * item["planes"] // threads for body in bodies]}
    if result["kernel"] == "shrink":
        share["x"] = [rows * own["BLOCK_K"] * item["x"] // threads for _ in bodies]
        share["a_slices"] = [b * own["BLOCK_K"] * item["a_slices"] // threads for b in bodies]
    else:
        share["y"] = [rows * own["BLOCK_N"] * item["y"] // threads]
        share["b_slices"] = [b * own["BLOCK_N"] * item["b_slices"] // threads for b in bodies]
    return share


def test_products_of_16_bit_values_run_on_tensor_cores(compiled):
    for result in compiled:
        case = BY_TITLE[result["case"]]
        multiplies = result["kernel"] != "combine" and torch.float32 not in (
            case.dtype,
            case.weight_dtype,
        )
        assert (result["tensor_core"] > 0) == multiplies, result


def test_halves_overlap_where_the_card_can(compiled):
    for result in compiled:
        first_of_a_call = result["kernel"] == "shrink" or (
            result["kernel"] == "expand" and BY_TITLE[result["case"]].halves is not None
        )
        can = result["architecture"] not in ("80", "89")
        first_of_a_call &= BY_TITLE[result["case"]].shrink != (("early", True),)
        assert result["starts_early"] == (can and not first_of_a_call), result
        # The first half lets others start, even if it does not itself.
        assert result["pdl"] == (can and (result["starts_early"] or result["kernel"] == "shrink"))


def test_what_starts_early_waits_before_it_reads_what_its_predecessor_wrote(asked_for, compiled):
    """And before it ends: whoever comes next waits for this one only."""
    early = [result for result in compiled if result["starts_early"]]
    names = {case.name for case in asked_for[0]}
    more = {"o mixed": "combine", "qkv decode, early": "shrink"}
    assert {result["kernel"] for result in early} == {
        "expand",
        *(kernel for name, kernel in more.items() if name in names),
    }
    for result in early:
        if result["kernel"] == "shrink":
            # The kernel before may have written x, or still use the memory that planes get.
            assert set(result["read_early"]) == {"plan", "ranks"}, result
            assert "x" in result["loads"], result
        else:
            assert "planes" in result["loads"], result
        assert "planes" not in result["read_early"], result
        assert result["written_early"] == [], result
        assert not result["ends_early"], result
        if result["kernel"] == "expand":
            assert "b_slices" in result["read_early"], result


def test_a_short_batchs_program_reads_its_tiles_record_beside_the_header(compiled):
    """Record, rank and tokens, weights and activations: three loads one after the other, at best.

    That is where the program has guessed its tile. In a long batch it waits for the header. What
    scales the product is read later.
    """
    for result in compiled:
        first = dict(result["loads_before"])
        header = int(result["constants"]["BLOCK_M"] > 16)
        assert (first.pop("plan"), first.pop("ranks")) == (0, 1 + header), result
        late = {first.pop(name, 0) for name in ("marks", "factors", "bias")}
        assert set(first.values()) == {2 + header}, result
        assert max(late) <= 3 + header, result


def test_the_cases_have_every_kind_of_launch():
    """A constant that no case varies would be a kernel that nobody compiles before it runs."""
    values = defaultdict(set)
    for architecture in CARDS:
        for case in CASES:
            for launch in launches(case, architecture):
                for name, value in launch.constants.items():
                    values[launch.kernel.__name__, name].add(value)
    for kernel, name in values:
        if name in ("OVERWRITE", "PDL", "ZEROS", "EARLY"):
            assert values[kernel, name] == {False, True}, (kernel, name)
        if name in ("BLOCK_M", "BLOCK_R", "BLOCK_K", "GRAIN", "SPLIT_K") and kernel[0] != "c":
            assert len(values[kernel, name]) > 1, (kernel, name)
    assert values["combine_kernel", "SPLIT_K"] > {1}
    assert min(values["shrink_kernel", "R"]) < 16
    assert max(values["shrink_kernel", "R"]) >= 256


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ONE, id="one"),
        pytest.param(TIGHT, id="tight"),
    ],
)
def test_amds_cards_get_wide_loads_and_matrix_instructions_and_nothing_spills(cases):
    results = report("--arch=gfx942", *(f"--case={case}" for case in cases))
    assert {result["kernel"] for result in results} >= {"shrink", "expand"}
    for result in results:
        case = BY_TITLE[result["case"]]
        assert result["spilled_bytes"] == 0, result
        assert result["shared_bytes"] <= CARDS["gfx942"].program_bytes, result
        assert 0 < result["per_processor"] <= result["resident"], result
        is_wide = case.name not in NARROW
        could = max(max(each) for each in shares(result, case).values()) >= 16
        assert not is_wide or not could or "16" in result["loads"]["all"], result
        # Of float32 blocks are small, and there are matrix instructions for some.
        if result["kernel"] != "combine" and torch.float32 not in (case.dtype, case.weight_dtype):
            assert could or not is_wide, result
            assert result["tensor_core"] > 0, result


@pytest.mark.slow
def test_the_tuners_candidates_compile_and_few_of_them_spill():
    """Which do, the tuner finds out by compiling them; on paper they all have enough registers."""
    results = report("--candidates", "--arch=90")
    blocks = {(r["kernel"], r["blocks"]) for r in results}
    assert len(blocks) == len(results) > 20
    spilling = [result for result in results if result["spilled_bytes"]]
    assert len(spilling) < len(results) / 6
    for result in results:
        assert result["shared_bytes"] <= SHARED_MEMORY_LIMIT, result
        assert result["tensor_core"] > 0, result
        assert (result["atomics"], result["in_flight"]) == (0, 0), result
        assert result["kernel"] == "shrink" or "planes" not in result["read_early"], result
    early = [result for result in results if "early" in result["blocks"]]
    by_rows = [result for result in results if "rows" in result["blocks"]]
    assert len(early) > 1
    assert len(by_rows) > 2
    for result in early:
        assert set(result["read_early"]) == {"plan", "ranks"}, result
        assert (result["written_early"], result["ends_early"]) == ([], False), result
