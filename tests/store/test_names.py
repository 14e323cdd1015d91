"""Names that API servers share: whoever publishes one hears when all serve it, or do not."""

from itertools import count, permutations
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.names_only import NOW, Stores
from vllm_multilora.store import shared_registrations as names_module
from vllm_multilora.store.clients import names_client as client_module
from vllm_multilora.store.clients.names_client import NamesClient
from vllm_multilora.store.protocol.messages import (
    Hello,
    Publish,
    Published,
    Refused,
    Retract,
    Retracted,
    Settled,
)
from vllm_multilora.store.shared_registrations import PATIENCE_S, PublishedNames


class Mail:
    """What each client was sent."""

    def __init__(self) -> None:
        self.boxes: dict[int, list] = {}

    def send(self, client, message):
        self.boxes.setdefault(client, []).append(message)

    def take(self, client: int) -> list:
        return self.boxes.pop(client, [])


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def names(mail) -> PublishedNames:
    """Three API servers of one server, and one of another."""
    names = PublishedNames(mail)
    for client in (1, 2, 3):
        names.join(client, "server", client)
    names.join(9, "another server", 9)
    return names


def publish(request: int, name: str = "acme", adapter: int = 7, again: bool = False) -> Publish:
    return Publish(request, name, adapter, f"/adapters/{adapter}", b"", again)


def test_the_next_event_is_the_first_change_that_is_given_up(names):
    for request, now in ((5, NOW), (6, NOW + 1.0)):
        names.publish(1, publish(request, adapter=request), now)
    assert names.next_event() == NOW + PATIENCE_S


def test_a_registration_is_answered_when_all_have_seen_it(names, mail):
    names.publish(1, publish(5), NOW)
    (to_one,), (to_two,), (to_three,) = (mail.take(client) for client in (1, 2, 3))
    assert to_one == to_two == to_three
    assert to_one == Published(to_one.serial, "acme", 7, "/adapters/7", b"")
    assert mail.take(9) == []
    for client in (2, 1):
        names.saw(client, to_one.serial)
        assert mail.take(1) == []
    names.saw(3, to_one.serial)
    assert mail.take(1) == [Settled(5)]
    assert names.next_event() is None


def test_changes_made_at_once_are_heard_by_all_in_one_order(names, mail):
    names.publish(1, publish(1, adapter=101), NOW)
    names.publish(2, publish(1, adapter=202), NOW)
    names.retract(3, Retract(1, "acme", 101), NOW)
    heard = [mail.take(client) for client in (1, 2, 3)]
    assert [message.adapter for message in heard[0]] == [101, 202, 101]
    assert heard[0] == heard[1] == heard[2]
    names.join(4, "server", 4)
    assert mail.take(4) == [
        Published(0, "acme", 202, "/adapters/202", b""),
        Retracted(0, "acme", 101),
    ]


def test_an_api_server_that_does_not_answer_holds_a_registration_up_for_a_while_only(names, mail):
    names.publish(1, publish(5), NOW)
    (seen,) = mail.take(1)
    names.saw(1, seen.serial)
    names.saw(2, seen.serial)
    assert names.next_event() == NOW + PATIENCE_S
    names.tick(NOW + PATIENCE_S / 2)
    assert mail.take(1) == []
    names.tick(NOW + PATIENCE_S)
    assert mail.take(1) == [Settled(5)]
    names.saw(3, seen.serial)  # too late, and no matter
    assert mail.take(1) == []
    assert names.next_event() is None


@pytest.mark.parametrize("leaves_first", [True, False])
def test_an_api_server_that_has_gone_is_not_waited_for(names, mail, leaves_first):
    names.publish(1, publish(5), NOW)
    (seen,) = mail.take(1)
    names.saw(1, seen.serial)
    steps = [lambda: names.leave(3), lambda: names.saw(2, seen.serial)]
    for step in steps if leaves_first else reversed(steps):
        assert mail.take(1) == []
        step()
    assert mail.take(1) == [Settled(5)]


def test_whoever_comes_later_learns_what_holds_now(names, mail):
    names.publish(1, publish(1, "acme", 7), NOW)
    names.publish(2, publish(1, "globex", 8), NOW)
    names.publish(1, publish(2, "acme", 9), NOW)  # another version
    names.retract(3, Retract(1, "globex", 8), NOW)
    names.join(4, "server", 4)
    assert mail.take(4) == [
        Published(0, "acme", 9, "/adapters/9", b""),
        Retracted(0, "acme", 7),
        Retracted(0, "globex", 8),
    ]
    names.join(8, "another server", 8)
    assert mail.take(8) == []


def test_whoever_comes_later_is_notified_of_no_change_that_holds_no_more(names, mail):
    names.publish(1, publish(1, adapter=7), NOW)
    names.publish(1, publish(2, adapter=8), NOW)
    names.publish(2, publish(1, "globex", 9), NOW)
    names.retract(2, Retract(2, "globex", 9), NOW)
    names.join(4, "server", 4, peers=4)
    holds = [message for message in mail.take(4) if message.serial]
    assert [(type(message), message.adapter) for message in holds] == [
        (Published, 8),
        (Retracted, 9),
    ]
    for client in (1, 2, 3):
        for message in mail.take(client):
            names.saw(client, message.serial)
    assert (mail.take(1), mail.take(2)) == ([Settled(1)], [Settled(1)])
    for message in holds:
        names.saw(4, message.serial)
    assert (mail.take(1), mail.take(2)) == ([Settled(2)], [Settled(2)])


def test_what_held_at_a_store_that_has_died_gives_way_to_what_was_said_since(names, mail):
    names.publish(1, publish(1, "acme", 7), NOW)
    names.retract(1, Retract(2, "globex", 8), NOW)
    mail.boxes.clear()
    for late in (Publish(5, "acme", 6, "/old", b"", True), Publish(6, "globex", 8, "/old", b"")):
        names.publish(2, late, NOW)
    instead = Retracted(0, "acme", 6)  # whoever has heard of it then forgets it
    assert mail.boxes == {1: [instead], 2: [instead, Settled(5), Settled(6)], 3: [instead]}
    mail.boxes.clear()
    names.publish(2, Publish(7, "initech", 9, "/old", b"", True), NOW)
    assert [message.adapter for message in mail.take(3)] == [9]


def test_api_servers_that_come_later_learn_the_newest_losses_alone(names, mail, monkeypatch):
    monkeypatch.setattr(names_module, "MAX_GONE", 2)
    for adapter in (1, 2, 3):
        names.retract(1, Retract(adapter, "acme", adapter), NOW)
    names.join(4, "server", 4)
    assert [message.adapter for message in mail.take(4)] == [2, 3]


def test_names_go_with_the_last_api_server_of_their_server(names, mail):
    names.publish(1, publish(1), NOW)
    names.leave(1)
    names.join(4, "server", 4)
    assert len(mail.take(4)) == 1
    for client in (2, 3, 4):
        names.leave(client)
    names.join(5, "server", 5)
    assert mail.take(5) == []


@pytest.mark.parametrize("again", [False, True], ids=["by one", "by all"])
def test_an_adapter_that_is_published_again_keeps_its_name(names, mail, again):
    """As one that a client does not know to have been heard by a store that has died."""
    for client in (1, 2, 3):
        names.publish(client if again else 1, publish(client, again=again), NOW)
    names.join(4, "server", 4)
    assert mail.take(4) == [Published(0, "acme", 7, "/adapters/7", b"")]


def test_how_many_api_servers_there_were_is_known_though_a_new_one_does_not_say_so(mail):
    names = PublishedNames(mail)
    names.join(1, "server", 101, peers=2)
    names.publish(1, publish(5), NOW)
    names.join(3, "server", 101)  # as one that was started again would
    for client in (1, 3):
        for message in mail.take(client):
            names.saw(client, message.serial)
    assert Settled(5) not in mail.take(1)


def test_nobody_else_publishes(names, mail):
    """An engine is a client too, and shares no names."""
    names.publish(77, publish(1), NOW)
    names.retract(77, Retract(2, "acme", 7), NOW)
    names.leave(77)
    assert not mail.boxes


PROCESSES = count(1000)


class ApiServer:
    """Has a table of names, as an API server does, and a process of its own."""

    def __init__(self, stores: Stores, peers: int = 1) -> None:
        pid = next(PROCESSES)
        with mock.patch.object(client_module, "os", SimpleNamespace(getpid=lambda: pid)):
            self.client = NamesClient(stores, "server", peers)
        self.table: dict[str, int] = {}
        self.settled: set[int] = set()

    def publish(self, name: str, adapter: int) -> int:
        self.table[name] = adapter
        return self.client.publish(name, adapter, "/adapter", {})

    def retract(self, name: str) -> int:
        return self.client.retract(name, self.table.pop(name))

    def hear(self) -> None:
        for message in self.client.poll():
            match message:
                case Published(_, name, adapter):
                    self.table[name] = adapter
                case Retracted(_, name, adapter) if self.table.get(name) == adapter:
                    del self.table[name]
                case Settled(request):
                    self.settled.add(request)
            if not isinstance(message, Settled) and message.serial:
                self.client.saw(message.serial)


def finish(stores: Stores, servers: list[ApiServer]) -> None:
    """Until nothing is left to be said."""
    for _ in range(8):
        for server in servers:
            server.hear()
        stores.work()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_retraction_that_a_store_has_not_read_is_said_to_the_next_one(order):
    """In whatever order API servers come there: one that publishes again, one that retracts."""
    stores = Stores()
    servers = [ApiServer(stores) for _ in range(3)]
    servers[0].publish("acme", 101)
    finish(stores, servers)
    assert [server.table for server in servers] == [{"acme": 101}] * 3
    request = servers[1].retract("acme")
    stores.die()
    for number in order:
        finish(stores, [servers[number]])
    finish(stores, servers)
    newcomer = ApiServer(stores)
    finish(stores, [newcomer])
    assert [server.table for server in (*servers, newcomer)] == [{}] * 4
    assert request in servers[1].settled


@pytest.mark.parametrize("change", ["publish", "retract"])
def test_a_change_after_a_stores_death_is_answered_when_those_have_come_that_were_there(change):
    stores = Stores()
    first, second = servers = [ApiServer(stores, peers=2) for _ in range(2)]
    request = first.publish("acme", 101)
    finish(stores, [first])
    assert request in first.settled, "the other one may begin at any time"
    finish(stores, servers)
    stores.die()
    request = first.publish("acme", 102) if change == "publish" else first.retract("acme")
    finish(stores, [first])
    assert request not in first.settled
    second.hear()  # has said that it is there, and heard nothing
    stores.work()
    first.hear()
    assert request not in first.settled
    finish(stores, servers)
    assert request in first.settled
    assert first.table == second.table == ({"acme": 102} if change == "publish" else {})


def test_a_change_that_was_replaced_is_answered_too_when_those_have_come_that_were_there():
    stores = Stores()
    first, _ = servers = [ApiServer(stores, peers=2) for _ in range(2)]
    finish(stores, servers)
    stores.die()
    requests = {first.publish("acme", 101), first.publish("acme", 102)}
    finish(stores, [first])
    assert requests.isdisjoint(first.settled)
    finish(stores, servers)
    assert requests <= first.settled


@pytest.mark.parametrize("is_back", [False, True])
def test_an_api_server_that_leaves_a_new_store_is_not_waited_for_there(is_back):
    """And is taken for no other one when it is back: only its connection was lost."""
    stores = Stores()
    servers = first, second, third = [ApiServer(stores, peers=3) for _ in range(3)]
    finish(stores, servers)
    stores.die()
    there = [first, second]
    finish(stores, there)
    second.client.close()
    stores.work()
    if is_back:
        finish(stores, there)
    else:
        there.remove(second)
    request = first.publish("acme", 101)
    finish(stores, there)
    assert request not in first.settled
    finish(stores, [*there, third])
    assert request in first.settled


def test_a_name_that_a_dead_store_announced_is_forgotten_where_another_replaced_it():
    stores = Stores()
    servers = first, second, third = [ApiServer(stores) for _ in range(3)]
    third.publish("acme", 100)
    stores.work()
    third.hear()
    third.publish("acme", 101)
    stores.die()
    first.publish("acme", 102)
    third.retract("acme")
    finish(stores, servers)
    assert first.table == second.table == third.table == {}


def test_names_published_at_once_are_distinguished_by_who_has_published_them():
    stores = Stores()
    servers = first, second = [ApiServer(stores) for _ in range(2)]
    first.publish("acme", 101)
    stores.work()
    first.publish("other", 102)
    first.hear()  # of one of them
    stores.die()
    finish(stores, servers)
    assert first.table == second.table == {"acme": 101, "other": 102}


@pytest.mark.parametrize("change", ["publish", "retract"])
def test_what_another_one_has_changed_is_not_said_again_to_the_next_store(change):
    stores = Stores()
    servers = first, second = [ApiServer(stores) for _ in range(2)]
    first.publish("acme", 101)
    finish(stores, servers)
    second.publish("acme", 102) if change == "publish" else second.retract("acme")
    finish(stores, servers)
    stores.die()
    finish(stores, [first])
    finish(stores, servers)
    newcomer = ApiServer(stores)
    finish(stores, [newcomer])
    assert newcomer.table == ({"acme": 102} if change == "publish" else {})


def test_a_name_that_a_store_announced_replaces_nothing_at_the_next_one():
    stores = Stores()
    servers = first, second = [ApiServer(stores) for _ in range(2)]
    first.publish("acme", 101)
    stores.work()
    first.hear()  # and before it is told that the others have heard, too, the store dies
    stores.die()
    second.publish("acme", 102)
    finish(stores, [second])
    finish(stores, servers)
    assert first.table == second.table == {"acme": 102}


def test_what_is_said_while_there_is_no_store_is_said_to_the_next_one():
    stores = Stores()
    first, second = servers = [ApiServer(stores) for _ in range(2)]
    finish(stores, servers)
    stores.is_down = True
    stores.die()
    pauses = []
    for _ in range(10):
        first.hear()
        pauses.append(first.client.pause_s)
    assert pauses == sorted(pauses)
    assert pauses[-1] == 5.0
    assert first.client.fileno() == -1
    request = first.publish("acme", 101)
    stores.is_down = False
    finish(stores, servers)
    assert second.table == {"acme": 101}
    assert request in first.settled
    assert first.client.pause_s < 1.0


def test_who_hears_that_an_older_adapter_has_lost_its_name_still_says_its_own_to_the_next_store():
    stores = Stores()
    first, second = servers = [ApiServer(stores) for _ in range(2)]
    first.publish("acme", 102)
    finish(stores, servers)
    second.client.retract("acme", 101)
    finish(stores, servers)
    stores.die()
    finish(stores, [first])
    newcomer = ApiServer(stores)
    finish(stores, [newcomer])
    assert newcomer.table == {"acme": 102}


def test_what_is_settled_is_not_said_to_the_next_store():
    stores = Stores()
    server = ApiServer(stores)
    server.publish("acme", 101)
    server.retract("acme")
    finish(stores, [server])
    stores.die()
    server.hear()
    server.hear()
    assert [type(message) for message in stores.said()] == [Hello]


def test_what_a_socket_cannot_hold_is_said_as_the_store_reads():
    stores = Stores()
    server = ApiServer(stores)
    request = server.client.publish("acme", 101, "/" + "x" * (2 << 20), {})
    for _ in range(1000):
        stores.work()
        server.hear()
        if request in server.settled:
            break
    assert server.table == {"acme": 101}


def test_why_a_store_refuses_to_serve_is_logged(caplog):
    stores = Stores()
    server = ApiServer(stores)
    stores.send(0, Refused("there is no descriptor left"))
    server.hear()
    assert "there is no descriptor left" in caplog.text


STEPS = st.sampled_from(["publish", "publish", "retract", "hear", "work", "work", "die"])


@settings(deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 2)), max_size=40))
def test_all_api_servers_end_with_the_same_names_and_none_that_was_retracted(steps):
    stores, numbers = Stores(), count(100)
    servers = [ApiServer(stores) for _ in range(3)]
    retracted = set()
    for step, place in steps:
        server = servers[place]
        if step == "publish":
            server.publish("acme", next(numbers))
        elif step == "retract" and server.table:
            retracted.add(server.table["acme"])
            server.retract("acme")
        elif step == "hear":
            server.hear()
        elif step == "work":
            stores.work()
        elif step == "die":
            stores.die()
    finish(stores, servers)
    newcomer = ApiServer(stores)
    finish(stores, [newcomer])
    tables = [server.table for server in (*servers, newcomer)]
    assert tables == [tables[0]] * 4
    assert retracted.isdisjoint(tables[0].values())
    for server in (*servers, newcomer):
        server.client.close()
    stores.die()
