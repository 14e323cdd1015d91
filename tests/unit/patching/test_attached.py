"""What is kept with an object is kept by name, and with nobody else."""

from types import SimpleNamespace

from vllm_multilora.integration.attached import Attached

FIRST: Attached[int | None] = Attached("first")
SECOND: Attached[str] = Attached("second")


def test_an_object_has_nothing_until_something_is_set():
    owner = SimpleNamespace()
    assert FIRST.get(owner) is None
    assert not FIRST.is_set(owner)
    assert not vars(owner)


def test_things_of_one_object_do_not_meet():
    owner, other = SimpleNamespace(), SimpleNamespace()
    FIRST.set(owner, 1)
    SECOND.set(owner, "two")
    FIRST.set(other, 3)
    assert (FIRST.get(owner), SECOND.get(owner), FIRST.get(other)) == (1, "two", 3)
    assert SECOND.get(other) is None


def test_none_can_be_set():
    owner = SimpleNamespace()
    FIRST.set(owner, None)
    assert FIRST.is_set(owner)
    assert FIRST.get(owner) is None


def test_what_is_made_for_an_object_is_made_once_even_if_it_is_none():
    owner = SimpleNamespace()
    assert FIRST.get_or_make(owner, lambda: None) is None
    assert FIRST.get_or_make(owner, lambda: 2) is None
    SECOND.set(owner, "given")
    assert SECOND.get_or_make(owner, str) == "given"
