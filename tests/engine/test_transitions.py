"""The table of an adapter's states: what each event leads to, and what is ordered then."""

import pytest

from tests.engine.fake_engine import Engine, lora, pack_info
from vllm_multilora.integration.worker_link.orders import Check
from vllm_multilora.states import AdapterState

PACK = pack_info(7)
SPECIAL = pack_info(7, special=True)
OTHER = pack_info(8, special=True)


class Watched(Engine):
    """Takes note of everything that is ordered."""

    def __init__(self) -> None:
        super().__init__(slots=1, ranks=1)
        self.ordered: list[str] = []
        for name in ("cancel", "release", "forget", "share"):
            self._watch(name)
        request_load, send = self.store.request_load, self.workers.send

        def note_load(asked):
            words = ["load", *["with a lease"] * asked.keep, *["anew"] * asked.fresh]
            self.ordered.append(" ".join(words))
            return request_load(asked)

        def note_orders(orders):
            self.ordered += ["check" if isinstance(each, Check) else "fill" for each in orders]
            send(orders)

        self.store.request_load, self.workers.send = note_load, note_orders

    def _watch(self, name: str) -> None:
        do = getattr(self.store, name)

        def noted(*args):
            self.ordered.append(name)
            do(*args)

        setattr(self.store, name, noted)


def request(engine: Engine) -> None:
    engine.adapters.request_load(lora(1))


def reload(engine: Engine) -> None:
    engine.adapters.request_load(lora(1, inplace=True))


def register(engine: Engine) -> None:
    engine.adapters.register(lora(1))


def register_again(engine: Engine) -> None:
    engine.adapters.register(lora(1, inplace=True))


def drop(engine: Engine) -> None:
    engine.adapters.drop(1)
    engine.adapters.poll()


def loaded(engine: Engine) -> None:
    engine.loaded(PACK)


def loaded_special(engine: Engine) -> None:
    engine.loaded(SPECIAL)


def loaded_other(engine: Engine) -> None:
    engine.loaded(OTHER)


def reading(engine: Engine) -> None:
    engine.store.reading()
    engine.poll()


def failed(engine: Engine) -> None:
    engine.failed()


def bring(engine: Engine) -> None:
    engine.bring(1)


def filled(engine: Engine) -> None:
    engine.filled()


def refused(engine: Engine) -> None:
    engine.refused()


def evicted(engine: Engine) -> None:
    engine.evict(7)


def restarted(engine: Engine) -> None:
    engine.store.restart()
    engine.adapters.poll()


def asleep(engine: Engine) -> None:
    engine.adapters.slots_lost()


def removed(engine: Engine) -> None:
    engine.adapters.remove(1)


SITUATIONS = {
    "unknown": (),
    "asked for": (request,),
    "being read": (request, reading),
    "on lease": (request, loaded),
    "in host memory": (request, loaded, drop),
    "being copied": (request, loaded, bring),
    "in a slot": (request, loaded, bring, filled),
    "in a slot alone": (request, loaded, bring, filled, evicted),
    "asked for anew": (request, loaded, bring, filled, reload),
    "failed": (request, failed),
    "registered": (register,),
    "registered, requested": (register, request),
    "with the workers": (register, loaded_special, loaded_special),
    "in a slot, checked": (
        request,
        loaded,
        bring,
        filled,
        drop,
        register_again,
        loaded_other,
        loaded_other,
    ),
}
STATES = {
    "unknown": "absent",
    "asked for": "queued",
    "being read": "reading",
    "on lease": "host",
    "in host memory": "host",
    "being copied": "host",
    "in a slot": "slot",
    "in a slot alone": "slot",
    "asked for anew": "queued",
    "failed": "failed",
    "registered": "queued",
    "registered, requested": "queued",
    "with the workers": "reading",
    "in a slot, checked": "slot",
}

TABLE = {
    "unknown": {
        request: "queued: load with a lease",
        reload: "queued: load with a lease anew",
        register: "queued: load",
        register_again: "queued: load anew",
    },
    "asked for": {
        reload: "queued: cancel, load with a lease anew",
        register: "queued: load",
        register_again: "queued: load anew",
        drop: "absent: cancel",
        loaded: "host",
        reading: "reading",
        failed: "failed",
        removed: "absent: cancel, forget",
    },
    "being read": {
        reload: "queued: cancel, load with a lease anew",
        register: "reading: load",
        register_again: "reading: load anew",
        drop: "absent: cancel",
        loaded: "host",
        failed: "failed",
        restarted: "queued",
        removed: "absent: cancel, forget",
    },
    "on lease": {
        reload: "queued: release, load with a lease anew",
        register_again: "host: load anew",
        drop: "host: release",
        bring: "host: fill",
        restarted: "absent",
        removed: "absent: release, forget",
    },
    "in host memory": {
        request: "host: load with a lease",
        reload: "queued: load with a lease anew",
        register_again: "host: load anew",
        evicted: "absent",
        restarted: "absent",
        removed: "absent: forget",
    },
    "being copied": {
        reload: "queued: load with a lease anew",
        register_again: "host: load anew",
        filled: "slot: release",
        refused: "failed: release",
        restarted: "absent",
        removed: "absent: forget",
    },
    "in a slot": {
        reload: "queued: load with a lease anew",
        register_again: "slot: load anew",
        asleep: "host",
        removed: "absent: forget",
    },
    "in a slot alone": {
        reload: "queued: load with a lease anew",
        register_again: "slot: load anew",
        asleep: "absent",
        removed: "absent: forget",
    },
    "asked for anew": {
        register: "queued: load",
        register_again: "queued: load anew",
        drop: "absent: cancel",
        loaded: "slot: release",
        reading: "reading",
        failed: "slot",
        removed: "absent: cancel, forget",
    },
    "failed": {
        request: "queued: load with a lease",
        reload: "queued: load with a lease anew",
        register: "queued: load",
        register_again: "queued: load anew",
        removed: "absent: forget",
    },
    "registered": {
        request: "queued: load with a lease",
        reload: "queued: load with a lease anew",
        loaded: "host",
        reading: "reading",
        failed: "absent: forget",
        removed: "absent: cancel, forget",
    },
    "registered, requested": {
        reload: "queued: cancel, load with a lease anew",
        removed: "absent: cancel, cancel, forget",
    },
    "with the workers": {
        request: "reading: load with a lease",
        reload: "reading: load with a lease anew",
        filled: "host: release",
        refused: "absent: forget, release",
        removed: "absent: forget",
    },
    "in a slot, checked": {
        reload: "reading: load with a lease anew",
        filled: "host: release",
        refused: "slot: release",
        asleep: "host",
        removed: "absent: forget",
    },
}
"""By situation and event: the state it leads to, and what is ordered. All others change nothing."""

ANY_TIME = (request, reload, register, register_again, drop, restarted, asleep, removed)


def situation(name: str) -> Watched:
    engine = Watched()
    for event in SITUATIONS[name]:
        event(engine)
    engine.ordered.clear()
    return engine


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_situation_is_shown_as_a_state(name):
    assert situation(name).adapters.state(1).value == STATES[name]


@pytest.mark.parametrize(
    ("name", "event"),
    [
        pytest.param(name, event, id=f"{name}-{event.__name__}")
        for name in SITUATIONS
        for event in (*ANY_TIME, *(each for each in TABLE[name] if each not in ANY_TIME))
    ],
)
def test_an_event_leads_to_a_state_and_to_orders(name, event):
    engine = situation(name)
    event(engine)
    state, _, ordered = TABLE[name].get(event, STATES[name]).partition(": ")
    assert engine.adapters.state(1) is AdapterState(state)
    assert ", ".join(engine.ordered) == ordered
