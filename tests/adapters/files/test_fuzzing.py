"""Whatever the files hold, validation and loading say what is wrong: no crash, no large memory."""

import json
import tempfile
import tracemalloc
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.intake import Rules
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.adapters.validation import validate

from ..corpus import LAYOUT
from ..corpus.draft import CONFIG, PREFIX, Q0, WEIGHTS, good
from ..corpus.headers import join, split
from ..packs import take

# Python says so of some expressions that it may read otherwise one day.
pytestmark = pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")

# What a check may take beside a multiple of the files: chunks of weights, compiled patterns.
FIXED_BYTES, BYTES_PER_BYTE = 8 << 20, 40


KEYS = [
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "peft_type",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "base_model_name_or_path",
]
TEXTS = st.text(max_size=8) | st.text("q.*+?()[]{}|\\1,^$", max_size=12) | st.just("q_proj")

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 8, -1, 2**63, 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(max_size=20) | st.builds(
    "{}{}{}".format,
    st.sampled_from(["", PREFIX, PREFIX * 2]),
    st.sampled_from([Q0, "model.layers.99.self_attn.q_proj", "lm_head", "model.embed_tokens", "."]),
    st.sampled_from(
        [".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_embedding_A", ".bias"]
    ),
)
SIZES = st.integers(-1, 300) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
ENTRIES = JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "BOOL", "F8_E4M3"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)
SOUND_TENSORS = st.dictionaries(
    NAMES,
    st.tuples(
        st.sampled_from([("F32", 4), ("BF16", 2), ("F16", 2), ("F64", 8), ("I8", 1)]),
        st.lists(st.sampled_from([0, 1, 8, 64, 96, 256]), max_size=3),
    ),
    max_size=4,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A content with a few bytes changed, a part repeated or left out, or the end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(content)))
        last = draw(st.integers(0, len(content)))
        filling = draw(st.binary(max_size=4))
        content = content[:first] + filling + content[last:]
    return content[:200_000]


def _contents() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = good([Q0]).write(Path(name))
        return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


GOOD_CONFIG, GOOD_WEIGHTS = _contents()
GOOD_HEADER, GOOD_DATA = split(GOOD_WEIGHTS)


def with_header(entries: dict[str, Any]) -> bytes:
    return join(json.dumps(GOOD_HEADER | entries).encode(), GOOD_DATA)


def sound_file(tensors: dict[str, tuple[tuple[str, int], list[int]]]) -> bytes:
    """A file without damage, of tensors that nobody expects there."""
    header, at = {}, 0
    for name, ((dtype, width), shape) in tensors.items():
        count = width
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    return join(json.dumps(header).encode(), bytes(at))


CONFIGS: dict[str, st.SearchStrategy[bytes]] = {
    "bytes": st.binary(max_size=200),
    "damaged": damaged(GOOD_CONFIG),
    "any-json": JSON.map(lambda value: json.dumps(value).encode()),
    "keys": st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4).map(
        lambda keys: json.dumps(json.loads(GOOD_CONFIG) | keys).encode()
    ),
    "patterns": st.dictionaries(
        st.text("ab.*+?()|[]{2,}\\", max_size=20), st.integers(), max_size=3
    )
    .map(lambda patterns: {"rank_pattern": patterns, "alpha_pattern": patterns})
    .map(lambda keys: json.dumps(json.loads(GOOD_CONFIG) | keys).encode()),
}
FILES: dict[str, st.SearchStrategy[bytes]] = {
    "bytes": st.binary(max_size=200),
    "damaged": damaged(GOOD_WEIGHTS),
    "length": st.integers(0, 2**64 - 1).map(
        lambda length: length.to_bytes(8, "little") + GOOD_WEIGHTS[8:]
    ),
    "header": st.binary(max_size=300).map(lambda header: join(header, GOOD_DATA)),
    "entries": st.dictionaries(NAMES, ENTRIES, max_size=3).map(with_header),
    "replaced": st.sampled_from(sorted(GOOD_HEADER)).flatmap(
        lambda name: ENTRIES.map(lambda entry: with_header({name: entry}))
    ),
    "sound": SOUND_TENSORS.map(sound_file),
}


def check(folder: Path) -> None:
    """Validates and loads an adapter; whatever it is, it has problems or can be served."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    tracemalloc.start()
    try:
        problems = validate(folder, LAYOUT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < FIXED_BYTES + BYTES_PER_BYTE * size
    assert all(isinstance(problem, Problem) for problem in problems)
    # As an HTTP answer carries them.
    json.dumps([problem.as_dict() for problem in problems], ensure_ascii=False).encode()
    # What has no problem loads; what has one is refused, unless only its values are wrong.
    seen = {problem.code for problem in problems} - {Code.NOT_FINITE, Code.OVERFLOW}
    expected = pytest.raises(AdapterError) if seen else nullcontext()
    with expected:
        take(folder, LAYOUT, rules=Rules(check_finite=False))


CASES = [(CONFIG, name, contents) for name, contents in CONFIGS.items()]
CASES += [(WEIGHTS, name, contents) for name, contents in FILES.items()]
IDS = [f"{file}-{name}" for file, name, _ in CASES]


@pytest.mark.parametrize(("file", "name", "contents"), CASES, ids=IDS)
def test_any_content_is_valid_or_a_problem(tmp_path, file, name, contents):
    folder = good([Q0]).write(tmp_path / "adapter")

    @settings(
        max_examples=100,
        deadline=timedelta(seconds=30),  # nothing hangs, however busy the machine
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def once(content: bytes) -> None:
        (folder / file).write_bytes(content)
        check(folder)

    once()


def test_the_unharmed_adapter_is_valid(tmp_path):
    """Else the fuzzing would find nothing but the same first problem."""
    folder = good([Q0]).write(tmp_path / "adapter")
    assert validate(folder, LAYOUT) == []
    (folder / WEIGHTS).write_bytes(with_header({}))
    assert validate(folder, LAYOUT) == []


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path):
    folder = good([Q0]).write(tmp_path / "adapter")
    name = sorted(GOOD_HEADER)[-1]
    claim = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    (folder / WEIGHTS).write_bytes(with_header({name: claim}))
    check(folder)
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + GOOD_WEIGHTS[8:])
    check(folder)
