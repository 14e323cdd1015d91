"""Names that API servers share: whoever publishes one hears when all others serve it, or do not."""

import pytest

from vllm_multilora.store.messages import Publish, Published, Retract, Retracted, Settled
from vllm_multilora.store.names import PATIENCE_S, Names

NOW = 1000.0


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
def names(mail) -> Names:
    """Three API servers of one server, and one of another."""
    names = Names(mail)
    for client in (1, 2, 3):
        names.join(client, "server")
    names.join(9, "another server")
    return names


def publish(request: int, name: str = "acme", adapter: int = 7) -> Publish:
    return Publish(request, name, adapter, f"/adapters/{adapter}", b"")


def test_a_registration_is_answered_when_all_others_have_seen_it(names, mail):
    names.publish(1, publish(5), NOW)
    (to_two,) = mail.take(2)
    (to_three,) = mail.take(3)
    assert to_two == to_three == Published(to_two.serial, "acme", 7, "/adapters/7", b"")
    assert mail.take(9) == []
    names.saw(2, to_two.serial)
    assert mail.take(1) == []
    names.saw(3, to_three.serial)
    assert mail.take(1) == [Settled(5)]


def test_an_api_server_on_its_own_is_answered_at_once(mail):
    names = Names(mail)
    names.join(1, "server")
    names.publish(1, publish(5), NOW)
    assert mail.take(1) == [Settled(5)]
    assert names.next_event() is None


def test_an_api_server_that_does_not_answer_holds_a_registration_up_for_a_while_only(names, mail):
    names.publish(1, publish(5), NOW)
    (seen,) = mail.take(2)
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
    (seen,) = mail.take(2)
    steps = [lambda: names.leave(3), lambda: names.saw(2, seen.serial)]
    for step in steps if leaves_first else reversed(steps):
        assert mail.take(1) == []
        step()
    assert mail.take(1) == [Settled(5)]


def test_whoever_comes_later_is_told_what_holds_now(names, mail):
    names.publish(1, publish(1, "acme", 7), NOW)
    names.publish(2, publish(1, "globex", 8), NOW)
    names.publish(1, publish(2, "acme", 9), NOW)  # another version
    names.retract(3, Retract(1, "globex"), NOW)
    names.join(4, "server")
    assert mail.take(4) == [Published(0, "acme", 9, "/adapters/9", b"")]
    names.join(8, "another server")
    assert mail.take(8) == []


def test_a_retraction_is_seen_by_all_before_it_is_answered(names, mail):
    names.publish(1, publish(1), NOW)
    for client in (1, 2, 3):
        mail.take(client)
    names.retract(2, Retract(4, "acme"), NOW)
    (to_one,) = mail.take(1)
    assert to_one == Retracted(to_one.serial, "acme")
    names.saw(1, to_one.serial)
    assert Settled(4) not in mail.take(2)
    names.saw(3, to_one.serial)
    assert mail.take(2) == [Settled(4)]


def test_names_go_with_the_last_api_server_of_their_server(names, mail):
    names.publish(1, publish(1), NOW)
    names.leave(1)
    names.join(4, "server")
    assert len(mail.take(4)) == 1
    for client in (2, 3, 4):
        names.leave(client)
    names.join(5, "server")
    assert mail.take(5) == []


def test_nobody_else_publishes(names, mail):
    """An engine is a client too, and shares no names."""
    names.publish(77, publish(1), NOW)
    names.retract(77, Retract(2, "acme"), NOW)
    names.leave(77)
    assert not mail.boxes
