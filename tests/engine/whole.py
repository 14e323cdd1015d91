"""A store with its engines and their workers, all of it real but processes, files and memory."""

from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
from vllm.v1.request import RequestStatus

from tests.engine.fake_engine import lora
from tests.engine.scheduling.fake_scheduler import AwareScheduler, FakeOutput, FakeRequest
from tests.slots.situations import make_slots
from tests.store.fake_reader import digest_of
from tests.store.loads.registries import CONTENTS, PAGE, World
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Fill
from vllm_multilora.store.memory.arena import PLACE_BITS
from vllm_multilora.store.protocol.job_messages import Place
from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest, Restarted

RANKS = 2
SPECIAL = "/adapters/3"


def path_of(number: int) -> str:
    """Adapters 4 and 5 are in one folder: they are the same files."""
    return f"/adapters/{min(number, 4)}"


class Files:
    """What folders hold, and what jobs have written to which page of host memory.

    Attributes:
        versions: By folder.
        memory: The digest that lies in each page (segment, offset); None while it is written.
    """

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.memory: dict[tuple[int, int], str | None] = {}

    def version(self, path: str) -> str:
        return f"{path}@{self.versions.get(path, 0)}"


class Store(World):
    """A registry whose jobs read `Files` and write to their memory.

    Args:
        generation: Tells this store's packs and segments from those of the stores before.
    """

    def __init__(self, settings, files: Files, generation: int) -> None:
        super().__init__(settings, first_pack=1 + 1000 * generation)
        self.memory.arena._next_segment = 1 + 1000 * generation
        self.files = files
        self.opened_as: dict[int, str] = {}

    def opened(self, job, version=None):
        self.opened_as[job] = self.files.version(self.loads[job].path)
        super().opened(job, self.opened_as[job])

    def checked(self, job, pages=1):
        self.jobs[job] = "checked"
        blocks = np.full(pages, PAGE, np.int64)
        special = self.loads[job].path == SPECIAL
        contents = msgspec.structs.replace(CONTENTS, has_special=special)
        self.registry.loads.checked(job, contents, blocks, self.now)

    def tell(self, job, message, segments):
        super().tell(job, message, segments)
        if isinstance(message, Place):
            self.write(job, None)

    def done(self, job, digest=None):
        digest = digest_of(self.opened_as[job])
        self.write(job, digest)
        self.registry.loads.done(job, digest, 64, self.now)

    def write(self, job: int, digest: str | None) -> None:
        allocation = self.loads[job].allocation
        for extent in allocation.extents if allocation else ():
            for offset in range(extent.offset, extent.offset + extent.size, PAGE):
                self.files.memory[extent.segment, offset] = digest


class Link:
    """An engine's connection: what it says is on its way until `deliver`; as `StoreClient`.

    Args:
        number: Of the engine.
        say: Calls what says something, sooner or later.
    """

    def __init__(self, number: int, say: Callable[[Callable[[], None]], None]) -> None:
        self.number = number
        self.say = say
        self.store: Store | None = None
        self.load_requests: dict[int, LoadRequest] = {}
        self.unseen: dict[int, LoadRequest] = {}
        self.outgoing: deque[Callable[[], None]] = deque()
        self.inbox: list = []
        self.tickets = 0

    def connect(self, store: Store) -> None:
        if self.store is not None:
            for message in self.inbox:
                if isinstance(message, Loaded):
                    self.load_requests[message.ticket] = self.unseen.pop(message.ticket)
            self.inbox = [m for m in self.inbox if isinstance(m, Failed)] + [Restarted()]
        self.outgoing.clear()
        self.store = store
        store.client(self.number)
        for load_request in self.load_requests.values():
            self._say_to(store, store.registry.request_load, load_request, store.now)

    def deliver(self) -> None:
        """The store hears all that was said, and the engine core what the store has said."""
        while self.outgoing:
            self.outgoing.popleft()()
        said = self.store.said[self.number]
        while said:
            message = said.pop(0)
            if isinstance(message, Loaded | Failed):
                if message.ticket not in self.load_requests:
                    if isinstance(message, Loaded) and message.leased:
                        self.release(message.pack.pack)
                    continue
                self.unseen[message.ticket] = self.load_requests.pop(message.ticket)
            self.inbox.append(message)

    def _say(self, method, *args) -> None:
        self.say(partial(self._say_to, self.store, method, *args))

    def _say_to(self, store: Store, method, *args) -> None:
        if store is self.store:
            self.outgoing.append(lambda: method(self.number, *args))

    def request_load(self, load_request):
        self.tickets += 1
        load_request = msgspec.structs.replace(load_request, ticket=self.tickets)
        self.load_requests[load_request.ticket] = load_request
        self._say(self.store.registry.request_load, load_request, self.store.now)
        return load_request.ticket

    def share(self, ticket, owner):
        if (
            load_request := self.load_requests.get(ticket)
        ) is not None and owner not in load_request.owners:
            self.load_requests[ticket] = msgspec.structs.replace(
                load_request, owners=(*load_request.owners, owner)
            )
            self._say(self.store.registry.share, ticket, owner)

    def cancel(self, ticket):
        if self.load_requests.pop(ticket, None) is not None:
            self._say(self.store.registry.cancel, ticket, self.store.now)
        self.unseen.pop(ticket, None)
        for message in self.inbox:
            if isinstance(message, Loaded) and message.ticket == ticket and message.leased:
                self.release(message.pack.pack)
        self.inbox = [m for m in self.inbox if getattr(m, "ticket", None) != ticket]

    def release(self, pack):
        self._say(self.store.registry.release, pack, self.store.now)

    def used(self, packs):
        self._say(self.store.registry.used, packs)

    def forget(self, adapter):
        self._say(self.store.registry.forget, adapter, self.store.now)

    def poll(self, seconds=0.0):
        inbox, self.inbox = self.inbox, []
        self.unseen.clear()
        return inbox


class Worker:
    """One rank: carries its orders out one after the other."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.orders: deque = deque()
        self.slots: dict[int, str] = {}  # digests
        self.last_segment_lost = 0

    def act(self, is_good: bool = True) -> Filled | FillFailed:
        order = self.orders.popleft()
        segment = order.pack.segments[order.pack.index_place >> PLACE_BITS]
        offset = order.pack.index_place & ((1 << PLACE_BITS) - 1)
        if segment <= self.last_segment_lost or not is_good:
            if isinstance(order, Fill):
                self.slots.pop(order.slot, None)  # half of it was written
            return FillFailed(order.order, FailureKind.INTERNAL, "it cannot be copied")
        found = self.files.memory[segment, offset]
        assert found == order.pack.digest, "a copy from memory that is another's by now"
        if isinstance(order, Fill):
            self.slots[order.slot] = found
        return Filled(order.order, 0.1)


class Workers:
    """An engine's ranks; what they answer is heard at the next `poll`."""

    def __init__(self, files: Files) -> None:
        self.ranks = [Worker(files) for _ in range(RANKS)]
        self.answers: list = []
        self.is_prompt = False  # whether it is done with orders before anybody tires of waiting

    def send(self, orders):
        for worker in self.ranks:
            worker.orders += orders

    def poll(self, seconds=0.0):
        if seconds and self.is_prompt:
            self.act_all()
        answers, self.answers = self.answers, []
        return answers

    def act(self, rank: int, is_good: bool = True) -> None:
        if self.ranks[rank].orders:
            self.answers.append((rank, self.ranks[rank].act(is_good)))

    def act_all(self) -> None:
        for rank, worker in enumerate(self.ranks):
            while worker.orders:
                self.act(rank)


class Config:
    def __init__(self, slots: int) -> None:
        self.lora_config = self
        self.additional_config: dict[str, object] = {}
        self.max_loras = slots


class Engine:
    """An engine core, its link and its workers."""

    def __init__(self, number: int, slots: int, files: Files, *, pinned=()) -> None:
        self.scheduler = AwareScheduler(vllm_config=Config(slots))
        self.scheduler.deferred_calls.wait = True
        self.link = Link(number, self.scheduler.deferred_calls.say)
        self.workers = Workers(files)
        observer = AdapterObserver(None, None, slots=slots, max_rank=8)
        assignment = make_slots(slots, events=observer, ranks=RANKS, pinned_names=pinned)
        self.adapters = EngineAdapters(
            self.link, self.workers, assignment, RANKS, observer, copy_s=0.0001
        )
        self.scheduler.attach_adapters(self.adapters)
        self.futures: list = []
        self.digests: dict[int, str] = {}  # of packs
        self.arrived = 0
        self.served: set[str] = set()
        self.failed: set[str] = set()

    def request(self, number: int, *, inplace: bool = False) -> None:
        self.arrived += 1
        adapter = lora(number, path=path_of(number), inplace=inplace)
        self.scheduler.add_request(FakeRequest(f"request {self.arrived}", adapter))

    def step(self, done: int = 0) -> None:
        """Schedules, looks at what the workers would compute with, and ends some requests."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.scheduler.get_grammar_bitmask(output)
        for request in self.scheduler.running:
            slot = self.adapters.slots.slot_of(request.lora_request.lora_int_id)
            for worker in self.workers.ranks:
                folder = f"{request.lora_request.lora_path}@"
                versions = range(worker.files.versions.get(folder[:-1], 0) + 1)
                assert worker.slots[slot] in {digest_of(f"{folder}{n}") for n in versions}
            assert len({worker.slots[slot] for worker in self.workers.ranks}) == 1
        names = tuple(request.request_id for request in self.scheduler.running[:done])
        outputs = self.scheduler.update_from_output(output, FakeOutput(names))
        self.served.update(names)
        for each in outputs.values():
            self.failed.update(last.request_id for last in each.outputs)

    def abort(self, which: int) -> None:
        names = sorted(self.scheduler.requests)
        if names:
            name = names[which % len(names)]
            self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
            self.failed.add(name)

    def unload(self, number: int) -> None:
        self.scheduler.retire_adapter(
            number, 1000.0, lambda leaves: self.futures.append(self.adapters.remove(number))
        )

    def lose_slots(self) -> None:
        self.workers.act_all()
        for worker in self.workers.ranks:
            worker.slots.clear()
        self.adapters.slots_lost()

    def check(self) -> None:
        """What is true at any time."""
        found = [number for number in self.adapters.slots.contents if number is not None]
        assert len(found) == len(set(found)), "an adapter in two slots"
        everybody = {f"request {number + 1}" for number in range(self.arrived)}
        known = self.scheduler.requests.keys()
        assert everybody == known | self.served | self.failed, "a request is lost"
