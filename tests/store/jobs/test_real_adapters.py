"""A store that reads real files: what it packs is what was written, and hostile files stay out."""

import json
import os
import struct
import time

import pytest
import torch

from tests.adapters.checkpoints import MODULES, PREFIX, layout, weights, write
from tests.store.conftest import Engine
from vllm_multilora.adapters.blend import Blend, BlendPart
from vllm_multilora.adapters.packing.pack_index import PackIndex
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.memory.mapper import SegmentMapper
from vllm_multilora.store.protocol.messages import Loaded, LoadRequest
from vllm_multilora.store.store_launch import StoreProcess, StoreThread

RANKS = {module: 4 for module, _, _ in MODULES}


@pytest.fixture
def engine(request, tmp_path):
    host = getattr(request, "param", StoreProcess)()
    roots = (str(tmp_path / "adapters"),)
    engine = Engine(StoreClient(host, "server"), [layout()], allowed_roots=roots)
    yield engine
    engine.client.close()


everywhere = pytest.mark.parametrize("engine", [StoreProcess, StoreThread], indirect=True)


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path / "adapters" / "a", weights(RANKS), rank=4, alpha=6)


@everywhere
def test_what_is_packed_is_what_was_written(engine, adapter):
    pack = engine.load(1, str(adapter)).pack
    mapper = SegmentMapper(engine.client.address, "server")
    index = PackIndex.decode(mapper.view(pack.index_place, pack.index_bytes, pack.segments))
    (rank,) = index.ranks
    written = weights(RANKS)
    assert rank.rows.tolist() == list(range(len(MODULES)))
    for row, (module, inputs, outputs) in enumerate(MODULES):
        for places, part, shape, scale in (
            (rank.a_places, "A", (4, inputs), 1.0),
            (rank.b_places, "B", (outputs, 4), 1.5),
        ):
            data = mapper.view(int(places[row]), 4 * shape[0] * shape[1], pack.segments)
            found = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
            expected = written[f"{PREFIX}{module}.lora_{part}.weight"] * scale
            assert torch.equal(found, expected)
    mapper.close()
    assert (pack.rank, pack.has_special) == (4, False)


def test_a_dora_adapter_is_distinguished_from_a_plain_one(tmp_path):
    client = StoreClient(StoreThread(), "server")
    engine = Engine(client, [layout(dora=True)], allowed_roots=(str(tmp_path),))
    tensors = weights(RANKS)
    plain = engine.load(1, str(write(tmp_path / "plain", tensors, rank=4, alpha=6))).pack
    tensors |= {
        f"{PREFIX}{module}.lora_magnitude_vector": torch.rand(outputs)
        for module, _, outputs in MODULES
    }
    folder = write(tmp_path / "dora", tensors, rank=4, alpha=6, use_dora=True)
    dora = engine.load(2, str(folder)).pack
    assert [(plain.kind, plain.dora), (dora.kind, dora.dora)] == [("lora", False), ("dora", True)]
    assert dora.nbytes - plain.nbytes >= sum(4 * outputs for _, _, outputs in MODULES)
    assert dora.digest != plain.digest
    client.close()


def test_a_file_rewritten_in_place_is_read_again_though_its_time_and_size_are_the_same(
    engine, adapter
):
    first = engine.load(1, str(adapter))
    before = (adapter / "adapter_model.safetensors").stat()
    write(adapter, weights(RANKS, seed=1), rank=4, alpha=6)
    os.utime(adapter / "adapter_model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    again = engine.load(1, str(adapter), fresh=True)
    assert again.was_read
    assert again.pack.digest != first.pack.digest


@pytest.mark.parametrize("alpha", [1e300, 1e44])
def test_an_adapter_that_is_read_again_is_checked_again_its_configuration_included(
    engine, adapter, alpha
):
    """Nothing has changed in the weights."""
    assert engine.load(1, str(adapter)).was_read
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))
    failed = engine.load(1, str(adapter), fresh=True)
    assert failed.kind is FailureKind.INVALID
    assert {problem["code"] for problem in failed.problems} == {"overflow"}


def test_another_scaling_is_another_adapter(engine, adapter, tmp_path):
    other = write(tmp_path / "adapters" / "b", weights(RANKS), rank=4, alpha=8)
    one, two = engine.load(1, str(adapter)), engine.load(2, str(other))
    assert one.pack.digest != two.pack.digest
    assert one.pack.pack != two.pack.pack


def test_equal_adapters_in_two_folders_take_memory_once(engine, adapter, tmp_path):
    copy = write(tmp_path / "adapters" / "copy", weights(RANKS), rank=4, alpha=6)
    one, two = engine.load(1, str(adapter)), engine.load(2, str(copy))
    assert one.pack.pack == two.pack.pack
    # The room of the second one is free when its job has ended.
    engine.until(lambda: engine.describe().totals.adapters == 1)


@everywhere
def test_all_that_is_wrong_comes_in_fields(engine, tmp_path):
    tensors = weights(RANKS)
    tensors[f"{PREFIX}{MODULES[0][0]}.lora_A.weight"][0, 0] = float("nan")
    folder = write(tmp_path / "adapters" / "bad", tensors, rank=4, alpha=6, use_dora=True)
    failed = engine.load(1, str(folder))
    assert failed.kind is FailureKind.INVALID
    codes = {problem["code"] for problem in failed.problems}
    assert {"not-finite", "unsupported-feature"} <= codes


def test_an_adapter_that_is_not_there_is_gone(engine, tmp_path):
    failed = engine.load(1, str(tmp_path / "adapters" / "none"))
    assert failed.kind is FailureKind.GONE
    empty = tmp_path / "adapters" / "empty"
    other = tmp_path / "adapters" / "other"
    for folder in (empty, other):
        folder.mkdir(parents=True)
    tickets = [
        engine.client.request_load(LoadRequest(n, "x", str(f))) for n, f in ((2, empty), (3, other))
    ]
    for ticket, folder in zip(tickets, (empty, other), strict=True):
        answer = engine.answer(ticket)
        assert answer.kind is FailureKind.GONE
        assert str(folder) in answer.message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_holds_nobody_up(engine, adapter, tmp_path, name):
    folder = write(tmp_path / "adapters" / "pipe", weights(RANKS), rank=4, alpha=6)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    begun = time.perf_counter()
    assert engine.load(1, str(folder)).kind is FailureKind.INVALID
    assert isinstance(engine.load(2, str(adapter)), Loaded)
    assert time.perf_counter() - begun < 5.0


@everywhere
def test_a_link_that_leads_out_of_the_roots_is_refused(engine, tmp_path):
    outside = write(tmp_path / "secret", weights(RANKS), rank=4, alpha=6)
    (tmp_path / "adapters").mkdir(exist_ok=True)
    (tmp_path / "adapters" / "link").symlink_to(outside)
    for path in (outside, tmp_path / "adapters" / "link"):
        failed = engine.load(1, str(path))
        assert [problem["code"] for problem in failed.problems] == ["not-allowed"]


@pytest.mark.parametrize("with_roots", [True, False], ids=["roots too", "directory only"])
@pytest.mark.parametrize("host", [StoreProcess, StoreThread], ids=["process", "thread"])
def test_what_lies_in_a_directory_must_not_lead_out_of_it(tmp_path, adapter, host, with_roots):
    served = tmp_path / "served"
    inside = write(served / "a", weights(RANKS), rank=4, alpha=6)
    outside = write(tmp_path / "secret", weights(RANKS), rank=4, alpha=6)
    borrowed = served / "borrowed"
    borrowed.mkdir()
    for file in outside.iterdir():
        (borrowed / file.name).symlink_to(file)
    roots = (str(tmp_path / "adapters"),) if with_roots else ()
    engine = Engine(
        StoreClient(host(), "server"),
        [layout()],
        directories=(str(served),),
        allowed_roots=roots,
    )
    assert isinstance(engine.load(1, str(inside)), Loaded)
    assert isinstance(engine.load(2, str(adapter)), Loaded)
    failed = engine.load(3, str(borrowed))
    assert [problem["code"] for problem in failed.problems] == ["not-allowed"]
    assert isinstance(engine.load(4, str(outside)), Loaded) != with_roots
    engine.client.close()


def write_header(folder, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_a_huge_header_costs_its_own_adapter_and_the_store_nothing(tmp_path, adapter):
    engine = Engine(StoreClient(StoreProcess(), "server"), [layout()], jobs=2)
    folder = write(tmp_path / "adapters" / "huge", weights(RANKS), rank=4, alpha=6)
    write_header(folder, b'{"__metadata__":{"a":[' + b"[]," * (15 << 20) + b"[]]}}")
    before = engine.store().memory_info().rss
    ticket = engine.client.request_load(LoadRequest(1, "huge", str(folder)))
    begun = time.perf_counter()
    assert isinstance(engine.load(2, str(adapter)), Loaded)
    assert time.perf_counter() - begun < 3.0
    failed = engine.answer(ticket, seconds=60)
    assert failed.kind in (FailureKind.INVALID, FailureKind.NO_MEMORY)
    assert engine.store().memory_info().rss - before < 16 << 20
    engine.client.close()


def test_a_pickled_adapter_is_read_where_that_is_allowed(tmp_path):
    root = tmp_path / "adapters"
    folder = write(root / "pickled", weights(RANKS), rank=4, alpha=6)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights(RANKS), folder / "adapter_model.bin")
    for allowed in (True, False):
        settings = {"allowed_roots": (str(root),), "allow_pickle": allowed}
        engine = Engine(StoreClient(StoreProcess(), "server"), [layout()], **settings)
        answer = engine.load(1, str(folder))
        assert isinstance(answer, Loaded) == allowed, answer
        engine.client.close()


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "adapters" / "b", weights(RANKS, seed=1), rank=4, alpha=4)


def blend_of(*parts: tuple[str, float]) -> str:
    return Blend.of(
        BlendPart(number, path.rpartition("/")[2], path, weight)
        for number, (path, weight) in enumerate(parts, 1)
    ).source


def test_a_blend_is_packed_from_its_parts_files_and_known_by_them(engine, adapter, other):
    source = blend_of((str(adapter), 0.5), (str(other), 2.0))
    first = engine.load(9, source)
    assert first.was_read
    assert (first.pack.kind, first.pack.rank) == ("blend", 8)
    assert first.pack.parts == tuple(
        engine.load(number, str(path)).pack.digest for number, path in ((1, adapter), (2, other))
    )
    # Under another number, from the same files: in memory already.
    again = engine.load(10, source)
    assert (again.was_read, again.pack.pack) == (False, first.pack.pack)
    # And not with other weights, or other files.
    stronger = engine.load(11, blend_of((str(adapter), 0.6), (str(other), 2.0)))
    assert stronger.was_read
    assert stronger.pack.digest != first.pack.digest
    write(other, weights(RANKS, seed=2), rank=4, alpha=4)
    changed = engine.load(9, source, fresh=True)
    assert changed.was_read
    assert changed.pack.parts[0] == first.pack.parts[0]
    assert changed.pack.parts[1] != first.pack.parts[1]


def test_a_part_outside_of_the_allowed_folders_is_not_blended(engine, adapter, tmp_path):
    outside = write(tmp_path / "elsewhere", weights(RANKS), rank=4, alpha=4)
    failed = engine.load(9, blend_of((str(adapter), 1.0), (str(outside), 1.0)))
    assert failed.kind is FailureKind.INVALID
    assert {problem["code"] for problem in failed.problems} == {"not-allowed"}
    assert engine.load(9, "blend:[[]]").kind is FailureKind.INVALID  # is not sent
