"""Chats over many adapters: for whom the KV cache's blocks are, and who should lose them first.

FASTLIBRA (a paper on caching for servers of many LoRA adapters) evicts adapters and blocks of the
KV cache together, as blocks of an adapter that is not on the GPU are of no use while it is not.
Here chats of some turns go over 40 adapters in 8 slots, with a KV cache for about a third of all
histories; a turn's prompt is the whole history. After each batch, every cached block is counted by
where its adapter is.

What another choice of victims would gain is computed from the same requests: the blocks that each
turn looks for and leaves behind are replayed on a cache of the same size that evicts the block that
was not used for longest, as vLLM does (`lru`); first those of adapters that are neither in a
slot nor in host memory, or not in a slot (`aware`); or the block whose next use is farthest away,
which nobody can know (`best`). The replay of `lru` is held against the engine's own count.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.engine_loop import power_law

ADAPTERS, SLOTS, HOST_PLACES = 40, 8, 16
BATCH, TURNS, ACTIVE = 8, 5, 60
ASKED, ANSWERED, BLOCK = 80, 16, 32
KV_BLOCKS = 320
MAX_DIFFERENCE = 0.03

Block = tuple[int, int]
"""A chat, and which block of its history."""


@dataclass
class Chat:
    """A conversation with one adapter.

    Attributes:
        number: Of all chats.
        adapter: Its adapter's number, from 1.
        history: All tokens so far.
        turns: How many it has had.
    """

    number: int
    adapter: int
    history: list[int] = field(default_factory=list)
    turns: int = 0


@dataclass(frozen=True)
class Turn:
    """What a turn did with the cache.

    Attributes:
        adapter: Its number.
        sought: The blocks of its prompt that could have been cached.
        left: All full blocks of prompt and answer.
        nearby: Adapters that were in slots when its batch ended, and in host memory.
    """

    adapter: int
    sought: tuple[Block, ...]
    left: tuple[Block, ...]
    nearby: tuple[frozenset[int], frozenset[int]]


Batch = list[Turn]


class Replay:
    """A cache of blocks that requests share by their prefixes.

    Args:
        places: Blocks that it holds.
        victim: Chooses one of the blocks that no running request has, least recently used first.
    """

    def __init__(self, places: int, victim: Callable[[Iterable[Block]], Block]) -> None:
        self._places = places
        self._victim = victim
        self._blocks: OrderedDict[Block, None] = OrderedDict()
        self.found = 0

    def run(self, batch: Batch) -> None:
        """Looks for the blocks of all turns, then keeps what they leave."""
        held: set[Block] = set()
        for turn in batch:
            for block in turn.sought:
                if block not in self._blocks:
                    break  # what comes after a missing block cannot be used
                held.add(block)
                self.found += 1
        for turn in batch:
            for block in turn.left:
                if block not in self._blocks:
                    if len(self._blocks) >= self._places:
                        free = (each for each in self._blocks if each not in held)
                        del self._blocks[self._victim(free)]
                    self._blocks[block] = None
                held.add(block)
        for turn in batch:
            for block in reversed(turn.left):  # the ends of histories go first, as in vLLM
                self._blocks.move_to_end(block)


def oldest(blocks: Iterable[Block]) -> Block:
    """As vLLM chooses."""
    return next(iter(blocks))


def first_without(nearby: frozenset[int], owner: dict[int, int]) -> Callable[..., Block]:
    """The oldest of an adapter that is not nearby; the oldest of all where there is none."""

    def choose(blocks: Iterable[Block]) -> Block:
        first = None
        for block in blocks:
            if owner[block[0]] not in nearby:
                return block
            first = first or block
        assert first is not None
        return first

    return choose


def farthest(next_use: dict[Block, int]) -> Callable[..., Block]:
    """The block that is sought last, or never."""

    def choose(blocks: Iterable[Block]) -> Block:
        return max(blocks, key=lambda block: (next_use.get(block, 1 << 30), block[1]))

    return choose


def replayed(batches: Sequence[Batch], owner: dict[int, int], policy: str) -> int:
    """Blocks that a policy would have found."""
    replay = Replay(KV_BLOCKS - 1, oldest)  # vLLM keeps one for itself
    for number, batch in enumerate(batches):
        slots, host = batch[0].nearby
        if policy == "aware of host memory":
            replay._victim = first_without(slots | host, owner)
        elif policy == "aware of slots":
            replay._victim = first_without(slots, owner)
        elif policy == "best":
            coming: dict[Block, int] = {}
            for later in range(len(batches) - 1, number, -1):
                coming.update(dict.fromkeys((b for t in batches[later] for b in t.sought), later))
            replay._victim = farthest(coming)
        replay.run(batch)
    return replay.found


def blocks_of(chat: Chat, tokens: int) -> tuple[Block, ...]:
    return tuple((chat.number, place) for place in range(tokens // BLOCK))


def chats(dice: random.Random, count: int) -> Iterator[list[Chat]]:
    """Batches of chats whose turn it is; finished ones make room for others."""
    weights = power_law(ADAPTERS)
    active: list[Chat] = []
    begun = 0
    while begun < count or len(active) >= BATCH:
        while len(active) < ACTIVE and begun < count:
            (adapter,) = dice.choices(range(1, 1 + ADAPTERS), weights)
            active.append(Chat(begun, adapter))
            begun += 1
        batch = dice.sample(active, BATCH)
        yield batch
        active = [chat for chat in active if chat.turns < TURNS]


@benchmark(
    workload="chats of five turns over 40 adapters in 8 slots, sixty of them at a time, and a KV "
    "cache for about a third of their histories",
    control="the same requests replayed with vLLM's own choice of victims",
    figure="cached blocks of adapters that are not there, and prompts' blocks found in the cache",
    compares_to="`lru`, and `best`, which knows what comes",
    quick={"count": 20},
)
def kv_residency(count: int = 120, seed: int = 0) -> Iterable[Figure]:
    """For whom the KV cache's blocks are, and what an adapter-aware choice of victims gains.

    Args:
        count: Chats.
        seed: Of their adapters and turns.
    """
    from tests.serving.models.recipes import AdapterRecipe
    from tests.serving.models.tiny_adapters import write_adapter
    from tests.serving.models.tiny_models import write_llama

    with tempfile.TemporaryDirectory() as scratch:
        base = write_llama(Path(scratch, "base"), positions=1024)
        recipe = AdapterRecipe("rank-8")
        folders = [
            write_adapter(base, Path(scratch, str(number)), recipe, seed=number)
            for number in range(1, 1 + ADAPTERS)
        ]
        yield from figures(base, folders, random.Random(seed), count)


def figures(
    base: Path, folders: Sequence[Path], dice: random.Random, count: int
) -> Iterator[Figure]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from tests.serving.cache_probe import report
    from tests.serving.engine import running_engine
    from tests.serving.models.tiny_models import VOCAB_SIZE

    loras = {n: LoRARequest(f"adapter-{n}", n, str(path)) for n, path in enumerate(folders, 1)}
    answer = SamplingParams(temperature=0.0, max_tokens=ANSWERED, ignore_eos=True, detokenize=False)
    shares: dict[str, list[float]] = {"in a slot": [], "in host memory": [], "in neither": []}
    batches: list[Batch] = []
    owner: dict[int, int] = {}
    found = sought = 0
    with running_engine(
        base,
        in_process=True,
        max_loras=SLOTS,
        max_cpu_loras=HOST_PLACES,
        max_num_seqs=BATCH,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        num_gpu_blocks_override=KV_BLOCKS,
    ) as llm:
        holders = note_holders(llm)
        for batch in chats(dice, count):
            owner |= {chat.number: chat.adapter for chat in batch}
            for chat in batch:
                chat.history += [dice.randrange(VOCAB_SIZE) for _ in range(ASKED)]
            outputs = llm.generate(
                [{"prompt_token_ids": list(chat.history)} for chat in batch],
                answer,
                lora_request=[loras[chat.adapter] for chat in batch],
                use_tqdm=False,
            )
            rows = report(llm)["adapters"]
            in_slots = frozenset(row["int_id"] for row in rows if row["slot"] is not None)
            in_host = frozenset(row["int_id"] for row in rows if row["bytes"]) - in_slots
            turns = []
            for chat, output in zip(batch, outputs, strict=True):
                requested = blocks_of(chat, len(chat.history) - 1)
                found += output.num_cached_tokens // BLOCK
                sought += len(requested)
                chat.history += output.outputs[0].token_ids
                chat.turns += 1
                left = blocks_of(chat, len(chat.history) - 1)  # of the last token there is no KV
                turns.append(Turn(chat.adapter, requested, left, (in_slots, in_host)))
            batches.append(turns)
            held = holders()
            slots = sum(n for adapter, n in held.items() if adapter in in_slots)
            host = sum(n for adapter, n in held.items() if adapter in in_host)
            total = held.total()
            for where, blocks in zip(shares, (slots, host, total - slots - host), strict=True):
                shares[where].append(blocks / total)
    for where, values in shares.items():
        steady = values[len(values) // 4 :]  # the cache is full by then
        yield Figure(f"adapter {where}", "of the cached blocks", [statistics.mean(steady)])
    yield Figure("engine", "blocks of prompts found", [found / sought])
    for policy in ("lru", "aware of host memory", "aware of slots", "best"):
        rate = replayed(batches, owner, policy) / sought
        if policy == "lru" and abs(rate - found / sought) > MAX_DIFFERENCE:
            raise SystemExit(f"the replay finds {rate:.3f}, the engine {found / sought:.3f}")
        yield Figure(policy, "blocks of prompts found", [rate])


def note_holders(llm: Any) -> Callable[[], Counter[int]]:
    """Counts an engine's cached blocks by their adapter, from now on."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    original = pool.cache_full_blocks
    adapters: dict[int, int] = {}

    def cache_full_blocks(request: Any, blocks: Any, *args: Any, **kwargs: Any) -> Any:
        for block in blocks:
            adapters[block.block_id] = request.lora_request.lora_int_id
        return original(request, blocks, *args, **kwargs)

    pool.cache_full_blocks = cache_full_blocks
    return lambda: Counter(
        adapters[block.block_id] for block in pool.blocks if block.block_hash is not None
    )
