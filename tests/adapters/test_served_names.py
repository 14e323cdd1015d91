"""Names and paths of strangers: what an adapter may be called, and what is no path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_multilora.adapters.blend import Blend, BlendPart
from vllm_multilora.adapters.directory import is_adapter_name
from vllm_multilora.adapters.served_names import (
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    name_fault,
    path_fault,
)


@pytest.mark.parametrize(
    "name",
    ["acme", "org/adapter-v2", "x" * 255, "é" * 127, "support 日本語", "🎉", "a..b", "a:b@c"],
)
def test_names_of_any_script_are_taken(name):
    assert name_fault(name) is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("x" * 256, "255 bytes", id="256"),
        pytest.param("é" * 128, "255 bytes", id="256-bytes-of-128-characters"),
        pytest.param("x" * 5000, "255 bytes", id="5000"),
        pytest.param("a\0b", "printed", id="null"),
        pytest.param("a\nINFO: all is well", "printed", id="newline"),
        pytest.param("\x1b[31mred", "printed", id="escape"),
        pytest.param("\x9b31m", "printed", id="escape-of-one-byte"),
        pytest.param("a\u2028b", "printed", id="line-separator"),
        pytest.param("\u202eevil", "printed", id="right-to-left"),
        pytest.param("\ud800", "printed", id="lone-surrogate"),
        pytest.param("../dir/name", "is . or ..", id="up"),
        pytest.param("dir/../../name", "is . or ..", id="up-inside"),
        pytest.param("..", "is . or ..", id="only-up"),
        pytest.param("./name", "is . or ..", id="here"),
    ],
)
def test_names_that_lie_or_lead_somewhere_are_not(name, fault):
    assert fault in name_fault(name)


@given(st.text(st.characters(), max_size=400))
def test_a_name_that_is_taken_harms_no_log_path_or_label(name):
    if name_fault(name) is None:
        assert len(name.encode()) <= MAX_NAME_BYTES
        assert name.isprintable()
        assert ".." not in name.split("/")
    if is_adapter_name(name):
        assert name_fault(name) is None
        assert "/" not in name


@pytest.mark.parametrize("path", ["/adapters/acme", "relative", "a" * MAX_PATH_BYTES, "with\nline"])
def test_paths_are_taken(path):
    assert path_fault(path) is None


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/" + "a" * MAX_PATH_BYTES, "4095"),
        ("é" * MAX_PATH_BYTES, "4095"),
        ("a\0b", "null"),
        ("/\ud800", "encoded"),
        (Blend.of([BlendPart(1, "a", "/a", 0.5)]).source, "text of a blend"),
    ],
    ids=["long", "long-in-bytes", "null", "surrogate", "blend"],
)
def test_what_is_no_path_is_not(path, fault):
    assert fault in path_fault(path)
