"""Configurations: computed defaults within bounds, tables that are checked when they are read."""

import itertools
import json

import pytest

from multilora_kernels.configs import (
    ConfigTableError,
    ExpandConfig,
    ShrinkConfig,
    Workload,
    choice,
    choose_expand,
    choose_shrink,
    default_expand,
    default_shrink,
    load_table,
)
from tools.kernels.measure.batches import LAYERS

SHRINK = {
    "block_m": 32,
    "block_r": 16,
    "block_k": 64,
    "split_k": 5,
    "num_warps": 2,
    "num_stages": 4,
    "per_processor": 3,
}
EXPAND = {"block_m": 16, "block_r": 16, "block_n": 256, "num_warps": 8, "num_stages": 1} | {
    "per_processor": 2
}
WORKLOAD = Workload(
    tokens=64,
    width=4096,
    slices=3,
    max_rank=64,
    item_size=2,
    architecture="sm_90",
    processors=132,
)


def table(**changes) -> dict:
    return {
        "architecture": "sm_90",
        "shrink": [{"max_tokens": 64, "max_rank": 64, "config": SHRINK}],
        "expand": [{"config": EXPAND}],
    } | changes


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTILORA_CONFIG_DIR", str(tmp_path))
    choice.choose_shrink.cache_clear()
    choice.choose_expand.cache_clear()

    def write(content, name: str = "sm_90") -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text)

    yield write
    choice.choose_shrink.cache_clear()
    choice.choose_expand.cache_clear()


def changed(workload: Workload, **values) -> Workload:
    return Workload(**(vars(workload) | values))


def test_every_workload_has_a_valid_default():
    sizes = itertools.product(
        [1, 16, 512, 8192], [1, 100, 4096, 57344], [1, 3], [1, 8, 100, 512], [2, 4], [1, 132]
    )
    for tokens, width, slices, max_rank, item_size, processors in sizes:
        workload = Workload(tokens, width, slices, max_rank, item_size, "sm_90", processors)
        for half in (default_shrink, default_expand):  # a config checks itself
            assert half(workload).block_m <= max(16, tokens)
        for half in (choose_shrink, choose_expand):
            half(workload, batch_invariant=True)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["default", "invariant"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_decoding_reads_little_of_h_beside_the_weights(layer, batch_invariant):
    """Adapters of one token each: a program reads all planes once for each run of its columns."""
    slices = len(layer.outputs)
    for tokens in (16, 128):
        shrink = choose_shrink(
            changed(WORKLOAD, tokens=tokens, width=layer.inputs, slices=slices),
            batch_invariant=batch_invariant,
        )
        expand = choose_expand(
            changed(WORKLOAD, tokens=tokens, width=sum(layer.outputs), slices=slices),
            batch_invariant=batch_invariant,
        )
        runs = WORKLOAD.processors * expand.per_processor + tokens * slices
        blocks = tokens * sum(-(-width // expand.block_n) for width in layer.outputs)
        weights = 2 * tokens * sum(layer.inputs + width for width in layer.outputs)
        assert 4 * shrink.split_k * min(runs, blocks) <= 0.15 * weights


@pytest.mark.parametrize("max_rank", [16, 32, 64, 128, 256])
def test_decoding_in_wide_layers_keeps_15_kib_of_b_under_way(max_rank):
    """What an H100 needs on each multiprocessor for its bandwidth, with a block of B a program."""
    for tokens in (8, 32, 64, 128):
        for layer in ("8b.gate_up", "70b.qkv", "70b.gate_up"):
            width = sum(LAYERS[layer].outputs)
            workload = changed(WORKLOAD, tokens=tokens, width=width, max_rank=max_rank)
            expand = default_expand(workload)
            pieces = 8 * width // expand.block_n  # of eight adapters
            programs = min(pieces / workload.processors, expand.per_processor)
            block = expand.block_n * expand.block_r * workload.item_size
            assert programs * block >= 15 << 10, (tokens, layer)


def test_invariant_blocks_do_not_depend_on_the_tokens_or_the_table(write):
    for half in (choose_shrink, choose_expand):
        before = half(WORKLOAD, batch_invariant=True)
        write(table())
        half.cache_clear()
        for tokens in (1, 64, 8192):
            assert half(changed(WORKLOAD, tokens=tokens), batch_invariant=True) == before


def test_only_a_table_asks_for_rows_without_tensor_cores_or_an_early_start(write):
    for tokens, width in itertools.product((1, 16, 128, 8192), (64, 4096, 28672)):
        workload = changed(WORKLOAD, tokens=tokens, width=width)
        for batch_invariant in (False, True):
            chosen = choose_shrink(workload, batch_invariant=batch_invariant)
            assert (chosen.vector_rows, chosen.early) == (0, False)
    choice.choose_shrink.cache_clear()
    requested = SHRINK | {"vector_rows": 4, "early": True}
    write(table(shrink=[{"config": requested}]))
    assert choose_shrink(WORKLOAD) == ShrinkConfig(**requested)
    invariant = choose_shrink(WORKLOAD, batch_invariant=True)
    assert (invariant.vector_rows, invariant.early) == (0, False)


def test_the_first_entry_that_holds_the_workload_is_taken(write):
    wider = {"max_tokens": 8192, "config": SHRINK | {"split_k": 9}}
    write(table(shrink=[table()["shrink"][0], wider]))
    assert choose_shrink(WORKLOAD) == ShrinkConfig(**SHRINK)
    assert choose_shrink(changed(WORKLOAD, tokens=128)).split_k == 9
    assert choose_shrink(changed(WORKLOAD, max_rank=128)).split_k == 9
    assert choose_expand(WORKLOAD) == ExpandConfig(**EXPAND)


def test_without_an_entry_or_a_table_the_default_is_computed(write):
    write(table(expand=[]))
    large = changed(WORKLOAD, tokens=16384)
    assert choose_shrink(large) == default_shrink(large)
    assert choose_expand(WORKLOAD) == default_expand(WORKLOAD)
    other = changed(WORKLOAD, architecture="gfx942")
    assert choose_shrink(other) == default_shrink(other)


BAD_TABLES = {
    "not-json": ("{", "cannot be read as JSON"),
    "not-an-object": ([], "the table must be a JSON object, found list"),
    "missing-half": (
        {"architecture": "sm_90", "shrink": []},
        "the table must have .* missing: expand",
    ),
    "unknown-key": (table(note="x"), "the table must have .* unknown: note"),
    "wrong-architecture": (
        table(architecture="sm_80"),
        "architecture must be 'sm_90', as the file is named, found 'sm_80'",
    ),
    "entries-not-a-list": (table(expand={}), "expand must be a list, found dict"),
    "unknown-limit": (
        table(expand=[{"max_token": 3, "config": EXPAND}]),
        r"expand\[0\] must have .* unknown: max_token",
    ),
    "limit-not-positive": (
        table(expand=[{"max_tokens": 0, "config": EXPAND}]),
        r"expand\[0\].max_tokens must be a positive integer, found 0",
    ),
    "config-of-the-other-half": (
        table(expand=[{"config": SHRINK}]),
        r"expand\[0\].config must have .* missing: block_n; unknown: block_k, split_k",
    ),
    "not-a-power-of-two": (
        table(expand=[{"config": EXPAND | {"block_n": 48}}]),
        r"expand\[0\].config: block_n must be a power of two from 16 to 512, got 48",
    ),
    "not-an-integer": (
        table(expand=[{"config": EXPAND | {"num_stages": True}}]),
        r"expand\[0\].config: num_stages must be an integer from 1 to 8, got True",
    ),
    "not-true-or-false": (
        table(shrink=[{"config": SHRINK | {"early": 1}}]),
        r"shrink\[0\].config: early must be true or false, got 1",
    ),
    "too-many-rows": (
        table(shrink=[{"config": SHRINK | {"vector_rows": 5}}]),
        r"shrink\[0\].config: vector_rows must be an integer from 0 to 4, got 5",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_a_table_that_is_not_valid_is_refused_with_file_and_place(write, content, message):
    write(content)
    with pytest.raises(ConfigTableError, match=rf"sm_90\.json: {message}"):
        load_table("sm_90")
