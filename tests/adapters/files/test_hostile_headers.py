"""Headers that would take long, or much memory, are refused before they are parsed."""

import json
import os
import time
import tracemalloc
from dataclasses import replace

import pytest

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.files.header import read_header
from vllm_multilora.adapters.files.regular_file import RegularFile
from vllm_multilora.adapters.model.naming import ModuleNaming
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS, SizeLimits
from vllm_multilora.adapters.problems import Code

from ..corpus import LAYOUT

MIB = 1 << 20
ENTRY = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


def read(tmp_path, text: bytes, limits: SizeLimits = DEFAULT_LIMITS):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with RegularFile(os.open(path, os.O_RDONLY), path) as file:
        return read_header(file, limits)


@pytest.mark.parametrize(
    "limits", [DEFAULT_LIMITS, SizeLimits().for_layouts([LAYOUT])], ids=["any", "dense"]
)
@pytest.mark.parametrize(
    "content",
    [
        b"[" + b"[]," * (40 * MIB // 3) + b"0]",
        b"[" + b"1," * (20 * MIB) + b"0]",
        b"[" + b"[" * (40 * MIB) + b"]",
    ],
    ids=["lists", "numbers", "nesting"],
)
def test_forty_mebibytes_of_anything_are_refused_at_once(tmp_path, content, limits):
    text = b'{"__metadata__":' + content + b"}"
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(AdapterFormatError, match=r"at most \d+") as caught:
        read(tmp_path, text, limits)
    took, (_, most) = time.thread_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.problems[0].code == Code.HEADER_TOO_LARGE
    assert took < 1
    assert most < 150 * MIB


@pytest.mark.parametrize(
    "metadata", ['"text"', "[]", '{"a":1}', '{"a":{"b":"c"}}', '{"a":null}'], ids=str
)
def test_metadata_is_an_object_of_texts(tmp_path, metadata):
    with pytest.raises(AdapterFormatError, match=r"__metadata__ is .* an object of texts"):
        read(tmp_path, f'{{"__metadata__":{metadata}}}'.encode())
    assert read(tmp_path, b'{"__metadata__":{"format":"pt"}}') == {}


def test_a_header_may_be_as_large_as_the_base_models_modules_need(tmp_path):
    dense = SizeLimits().for_layouts([LAYOUT])
    assert dense.header_bytes < 2 * MIB
    # Every module twice, with long names and half a mebibyte of notes.
    names = [f"base_model.model.{'x' * 100}.{i}.lora_A.weight" for i in range(4 * 21)]
    notes = json.dumps({"training": "[{}]," * (MIB // 10)})
    text = f'{{"__metadata__":{notes},' + ",".join(map(ENTRY.format, names)) + "}"
    assert len(read(tmp_path, text.encode(), dense)) == len(names)


def test_a_header_has_its_full_bound_where_modules_are_not_known_by_name():
    experts = replace(LAYOUT, special=LAYOUT.special | {"model.layers.0.mlp.experts"})
    pipelined = replace(LAYOUT, naming=ModuleNaming(others=("model.layers.1.",)))
    tower = replace(LAYOUT, naming=ModuleNaming(unwrapped=frozenset(map(str, range(1000)))))
    assert SizeLimits().for_layouts([LAYOUT, experts]) == SizeLimits()
    assert SizeLimits().for_layouts([pipelined]) == SizeLimits()
    assert SizeLimits().for_layouts([tower]).header_bytes > 2 * MIB
    assert SizeLimits(header_bytes=10).for_layouts([LAYOUT]).header_bytes == 10


def test_names_that_cannot_be_encoded_are_refused(tmp_path):
    """No process could be told of them: lm_head's A, of an adapter whose name is half a pair."""
    name = r"base_model.model.lm_head.lora_A.\ud800.weight"
    with pytest.raises(AdapterFormatError, match="that UTF-8 can encode"):
        read(tmp_path, f"{{{ENTRY.format(name)}}}".encode())
    pair = ENTRY.format(r"\ud83d\ude00")  # one character, as JSON may spell it
    assert list(read(tmp_path, f"{{{pair}}}".encode())) == ["\U0001f600"]


@pytest.mark.parametrize("name", ["x" * 257, "a." * 33], ids=["long", "dots"])
def test_names_are_short_enough_for_every_expression_that_sees_them(tmp_path, name):
    with pytest.raises(AdapterFormatError, match="at most"):
        read(tmp_path, f"{{{ENTRY.format(name)}}}".encode())
