"""An engine core's adapters between a store and workers that the test plays."""

import time
from collections import Counter
from collections.abc import Callable

import msgspec
from vllm.lora.request import LoRARequest

from tests.slots.situations import make_slots
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Check, Fill
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Forgotten,
    Loaded,
    LoadRequest,
    PackInfo,
    Reading,
    Restarted,
)

MAX_BLENDS = 3


def lora(number: int, *, path: str | None = None, inplace: bool = False) -> LoRARequest:
    path = path or f"/adapters/{number}"
    return LoRARequest(f"adapter {number}", number, path, load_inplace=inplace)


def pack_info(
    pack: int, digest: str = "", *, special: bool = False, nbytes: int = 64, rank: int = 8
) -> PackInfo:
    return PackInfo(
        rank=rank,
        has_special=special,
        invocation_tokens=(),
        dora=False,
        pack=pack,
        nbytes=nbytes,
        digest=digest or f"digest {pack}",
        segments=[1],
        index_place=0,
        index_bytes=64,
        parts=(),
    )


class FakeStore:
    """Answers what the test says; takes note of leases."""

    def __init__(self) -> None:
        self.load_requests: dict[int, LoadRequest] = {}
        self.leases: Counter[int] = Counter()
        self.forgotten: list[int] = []
        self.used_packs: list[list[int]] = []
        self.inbox: list = []
        self.tickets = 0
        self.waited = 0  # how often somebody has
        self.answers: Callable[[], None] = lambda: None  # when somebody waits

    # What the engine core asks

    def request_load(self, load_request):
        self.tickets += 1
        self.load_requests[self.tickets] = msgspec.structs.replace(
            load_request, ticket=self.tickets
        )
        return self.tickets

    def share(self, ticket, owner):
        if (asked := self.load_requests.get(ticket)) is not None:  # else the answer is on its way
            self.load_requests[ticket] = msgspec.structs.replace(
                asked, owners=(*asked.owners, owner)
            )

    def cancel(self, ticket):
        self.load_requests.pop(ticket, None)
        for message in self.inbox:
            if isinstance(message, Loaded) and message.ticket == ticket and message.leased:
                self.release(message.pack.pack)
        self.inbox = [m for m in self.inbox if getattr(m, "ticket", None) != ticket]

    def release(self, pack):
        assert self.leases[pack] > 0, f"a lease on pack {pack} is given back that nobody has"
        self.leases[pack] -= 1

    def used(self, packs):
        self.used_packs.append(packs)

    def forget(self, adapter):
        self.forgotten.append(adapter)

    def poll(self, seconds=0.0):
        if seconds and not self.inbox:
            self.waited += 1
            self.answers()
            if not self.inbox:
                time.sleep(seconds)
        inbox, self.inbox = self.inbox, []
        return inbox

    # What the test says

    def only(self) -> LoadRequest:
        (load_request,) = self.load_requests.values()
        return load_request

    def loaded(
        self, pack: PackInfo, load_request: LoadRequest | None = None, *, was_read: bool = True
    ) -> None:
        load_request = load_request or self.only()
        del self.load_requests[load_request.ticket]
        leased = load_request.keep
        assert not leased or pack.pack
        self.leases[pack.pack] += leased
        self.inbox.append(Loaded(load_request.ticket, pack, 0.1, was_read, leased))

    def reading(self) -> None:
        self.inbox.append(Reading(self.only().ticket))

    def failed(
        self,
        load_request: LoadRequest | None = None,
        kind=FailureKind.INVALID,
        problems: tuple = (),
    ) -> None:
        load_request = load_request or self.only()
        del self.load_requests[load_request.ticket]
        self.inbox.append(Failed(load_request.ticket, kind, "it is bad", list(problems)))

    def evict(self, pack: int) -> None:
        assert not self.leases[pack]
        self.inbox.append(Evicted(pack))

    def forgets(self) -> None:
        self.inbox += [Forgotten(adapter) for adapter in self.forgotten]
        self.forgotten.clear()

    def restart(self) -> None:
        self.leases.clear()
        self.forgotten.clear()
        self.release = self._release_to_a_new_store  # type: ignore[method-assign]
        self.inbox = [m for m in self.inbox if isinstance(m, Failed)] + [Restarted()]

    def _release_to_a_new_store(self, pack: int) -> None:
        """Old leases mean nothing to it."""
        self.leases[pack] -= self.leases[pack] > 0

    @property
    def leased(self) -> dict[int, int]:
        return {pack: count for pack, count in self.leases.items() if count}


class FakeWorkers:
    """Take orders, and answer them when the test says."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.orders: list[Fill | Check] = []  # those that not all ranks have answered
        self.sent: list[Fill | Check] = []
        self._unanswered: dict[int, set[int]] = {}
        self._answers: list = []
        self.waited = 0  # how often somebody waited
        self.answers: Callable[[], None] = lambda: None  # when somebody waits

    def send(self, orders):
        assert orders, "a call of all workers for nothing"
        self.orders += orders
        self.sent += orders
        self._unanswered |= {order.order: set(range(self.ranks)) for order in orders}

    def poll(self, seconds=0.0):
        if seconds and not self._answers:
            self.waited += 1
            self.answers()
            if not self._answers:
                time.sleep(seconds)
        answers, self._answers = self._answers, []
        return answers

    def only(self) -> Fill | Check:
        (order,) = self.orders
        return order

    def say(self, answer, ranks=None) -> None:
        for rank in range(self.ranks) if ranks is None else ranks:
            self._answers.append((rank, answer))
            if hasattr(answer, "order"):
                self._unanswered[answer.order].discard(rank)
        self.orders = [order for order in self.orders if self._unanswered[order.order]]

    def say_anything(self, answer) -> None:
        self._answers.append((0, answer))

    def filled(self, order=None, ranks=None) -> None:
        self.say(Filled((order or self.only()).order, 0.1), ranks)

    def refused(self, order=None, ranks=None, kind=FailureKind.INTERNAL) -> None:
        self.say(FillFailed((order or self.only()).order, kind, "it does not fit"), ranks)


class Engine:
    """`EngineAdapters` with what tests do all the time."""

    def __init__(
        self,
        slots: int = 2,
        ranks: int = 2,
        *,
        pinned=(),
        wait_s=0.0,
        required=None,
        signing_keys=None,
        recorder=None,
        most_blends=MAX_BLENDS,
        copy_s=0.0,
    ) -> None:
        self.store = FakeStore()
        self.workers = FakeWorkers(ranks)
        observer = AdapterObserver(recorder, None, slots=slots, max_rank=8)
        assignment = make_slots(slots, events=observer, ranks=ranks, pinned_names=pinned)
        self.adapters = EngineAdapters(
            self.store,
            self.workers,
            assignment,
            ranks,
            observer,
            wait_s=wait_s,
            copy_s=copy_s,
            required=required,
            signing_keys=signing_keys,
            most_blends=most_blends,
        )
        self.is_restarted = False

    def poll(self) -> None:
        self.adapters.poll()
        self.check()

    def step(self, *running: int) -> None:
        """A step with these adapters is scheduled."""
        self.adapters.begin_step(frozenset(running))
        self.adapters.running(frozenset(running))
        self.check()

    def host(self, number: int, pack: int | None = None, **content) -> None:
        """A request has come for an adapter, and the store has it."""
        self.adapters.request_load(lora(number))
        self.loaded(pack_info(pack or number, **content))

    def fill(self, number: int, pack: int | None = None, **content) -> None:
        """A request has come for an adapter, and it is in its slot."""
        self.host(number, pack, **content)
        assert self.adapters.is_ready(number)
        assert not self.bring(number)
        self.filled()
        assert self.adapters.bring(number)
        self.step(number)

    def loaded(self, pack: PackInfo, *of: LoadRequest, was_read: bool = True) -> None:
        self.store.loaded(pack, *of, was_read=was_read)
        self.poll()

    def failed(self, *of: LoadRequest, **why) -> None:
        self.store.failed(*of, **why)
        self.poll()

    def evict(self, pack: int) -> None:
        self.store.evict(pack)
        self.poll()

    def bring(self, number: int) -> bool:
        is_there = self.adapters.bring(number)
        self.poll()
        return is_there

    def filled(self, *order: Fill | Check, ranks=None) -> None:
        self.workers.filled(*order, ranks=ranks)
        self.poll()

    def refused(self, *order: Fill | Check, ranks=None) -> None:
        self.workers.refused(*order, ranks=ranks)
        self.poll()

    def answer(self) -> None:
        """The store and the workers answer everything."""
        for load_request in list(self.store.load_requests.values()):
            self.store.loaded(pack_info(load_request.adapter), load_request)
        for order in list(self.workers.orders):
            self.workers.filled(order)

    def idle(self) -> None:
        """Nothing runs any more, and nobody comes back for a slot."""
        for _ in range(2):
            self.step()

    def restart_store(self) -> None:
        self.store.restart()
        self.is_restarted = True
        self.poll()

    def check(self) -> None:
        """What workers read stays in host memory meanwhile."""
        for order in [] if self.is_restarted else self.workers.orders:
            assert self.store.leases[order.pack.pack], f"{order} reads what may be gone"

    def all_is_given_back(self) -> None:
        """All orders are answered and all requests over: nothing is on lease."""
        self.adapters.poll()
        for order in list(self.workers.orders):
            self.workers.filled(order)
        self.adapters.poll()
        assert not self.store.leased
