"""Cached prefixes are found by what adapters contain, on every server and after every restart."""

import json
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import zmq

from ..engine import BLOCK_SIZE, answer, assert_as_peft, generate, running_engine
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import free_port

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

FIRST, SECOND = (recipe.name for recipe in LINEAR_RECIPES[:2])
PROMPT = [7 * number % 97 + 1 for number in range(2 * BLOCK_SIZE + 5)]
LIMIT_S = 30.0


class Engine:
    """An engine whose block hashes can be heard, as vLLM publishes them."""

    def __init__(self, llm: "LLM", events: zmq.Socket) -> None:
        self.llm = llm
        self._events = events
        self._stored: dict[str | None, list[bytes]] = {}

    def await_events(self) -> None:
        """Until events are heard: what was published before somebody listens is lost."""
        deadline, number = time.monotonic() + LIMIT_S, 100
        while not self._events.poll(100):
            assert time.monotonic() < deadline
            self.ask(None, [number] * BLOCK_SIZE)
            number += 1
        while self._events.poll(200):
            self._events.recv_multipart()

    def ask(self, lora: "LoRARequest | None", prompt: list[int] = PROMPT) -> int:
        """Has a prompt computed; returns how many of its tokens came from the cache."""
        (output,) = generate(self.llm, [prompt], [lora], max_tokens=1)
        assert output.outputs[0].finish_reason == "length", output.outputs[0].stop_reason
        return output.num_cached_tokens

    def keys(self, lora: "LoRARequest | None") -> tuple[bytes, ...]:
        """The hashes of the blocks of a prompt that nobody has computed with these weights."""
        assert self.ask(lora) == 0
        name = lora.lora_name if lora else None
        deadline = time.monotonic() + LIMIT_S
        while len(self._stored.get(name, ())) < len(PROMPT) // BLOCK_SIZE:
            assert time.monotonic() < deadline, f"no events of {name}"
            if self._events.poll(100):
                self._take(self._events.recv_multipart()[-1])
        return tuple(self._stored[name])

    def _take(self, payload: bytes) -> None:
        from vllm.distributed.kv_events import BlockStored, KVEventBatch

        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            if isinstance(event, BlockStored):
                self._stored.setdefault(event.lora_name, []).extend(event.block_hashes)


@contextmanager
def listening_engine(base: Path) -> Iterator[Engine]:
    from vllm.config import KVEventsConfig

    port = free_port()
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.subscribe("")
        events.connect(f"tcp://127.0.0.1:{port}")
        config = KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint=f"tcp://*:{port}"
        )
        with running_engine(base, in_process=True, kv_events_config=config) as llm:
            engine = Engine(llm, events)
            engine.await_events()
            yield engine


def request(name: str, number: int, folder: Path, **options: bool) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def reordered(source: Path, target: Path) -> Path:
    """The same adapter, with its tensors the other way round in the file."""
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    turned, tensors = bytearray(), {}
    for name, entry in sorted(header.items(), key=lambda item: -item[1]["data_offsets"][0]):
        begin, end = entry["data_offsets"]
        tensors[name] = entry | {"data_offsets": [len(turned), len(turned) + end - begin]}
        turned += data[begin:end]
    text = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + turned)
    return target


def changed_by_a_byte(source: Path, target: Path) -> Path:
    """The same adapter, but for the lowest bits of its last number."""
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    return target


@dataclass(frozen=True)
class Elsewhere:
    """What another server, which has ended, has called the blocks of a prompt.

    Attributes:
        base: Without an adapter.
        first: With the first adapter.
        second: With the second.
        other: With the first, changed by a byte.
        alias: Tokens of the prompt that it had cached for the first adapter's reordered copy.
    """

    base: tuple[bytes, ...]
    first: tuple[bytes, ...]
    second: tuple[bytes, ...]
    other: tuple[bytes, ...]
    alias: int


@pytest.fixture(scope="module")
def folders(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, first = tmp_path_factory.mktemp("keys"), llama.adapters[FIRST]
    return {
        "first": first,
        "second": llama.adapters[SECOND],
        "alias": reordered(first, root / "alias"),
        "other": changed_by_a_byte(first, root / "other"),
    }


@pytest.fixture(scope="module")
def elsewhere(llama: Scenario, folders: dict[str, Path]) -> Elsewhere:
    with listening_engine(llama.base) as engine:
        base = engine.keys(None)
        first = engine.keys(request("first", 1, folders["first"]))
        second = engine.keys(request("second", 2, folders["second"]))
        # Under another name, number and path, and not read yet.
        alias = engine.ask(request("alias", 3, folders["alias"]))
        other = engine.keys(request("other", 4, folders["other"]))
    return Elsewhere(base, first, second, other, alias)


@pytest.fixture(scope="module")
def engine(llama: Scenario, elsewhere: Elsewhere) -> Iterator[Engine]:
    with listening_engine(llama.base) as running:
        yield running


def test_other_weights_share_no_key_and_equal_ones_share_all(elsewhere: Elsewhere) -> None:
    keys = {*elsewhere.base, *elsewhere.first, *elsewhere.second, *elsewhere.other}
    assert len(keys) == 4 * len(elsewhere.base) == 8
    assert elsewhere.alias == 2 * BLOCK_SIZE


def test_keys_are_the_same_on_another_server_in_another_order_under_other_names(
    engine: Engine, elsewhere: Elsewhere, folders: dict[str, Path]
) -> None:
    assert engine.keys(request("b", 1, folders["second"])) == elsewhere.second
    assert engine.keys(request("c", 2, folders["other"])) == elsewhere.other
    assert engine.keys(request("a", 7, folders["alias"])) == elsewhere.first
    assert engine.ask(request("first", 9, folders["first"])) == 2 * BLOCK_SIZE
    assert engine.keys(None) == elsewhere.base


def test_new_weights_under_an_old_number_never_meet_blocks_of_the_old_ones(
    engine: Engine, llama: Scenario, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    cases = {name: _long_case(llama, name) for name in (FIRST, SECOND)}
    prompts = [list(case.prompt) for case in cases.values()]
    deployed = Scenario(llama.base, {"deployed": folder}, ())
    for name, cached in ((FIRST, 0), (SECOND, 0), (FIRST, BLOCK_SIZE)):
        shutil.copytree(llama.adapters[name], folder, dirs_exist_ok=True)
        again = request("deployed", 1, folder, load_inplace=True)
        assert [engine.ask(again, prompt) for prompt in prompts] == [cached, cached]
        case = Case("deployed", cases[name].prompt, cases[name].expected)
        assert_as_peft(answer(engine.llm, deployed, [case]), [case])


def _long_case(llama: Scenario, name: str) -> Case:
    return max(llama.cases_of(name), key=lambda case: len(case.prompt))
