"""Pins by the settings and by calls share the places for pins."""

import pytest

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.pins import PinLimitError, Pins


def test_one_slot_stays_without_pin() -> None:
    pins = Pins(3)
    pins.pin(2)
    pins.pin(1)
    pins.pin(1)
    with pytest.raises(
        PinLimitError, match=r"of 3 slots one must stay free .*\(pinned: 1, 2\); unpin"
    ):
        pins.pin(3)
    pins.unpin(2)
    pins.pin(3)
    assert pins.adapters == {1, 3}
    assert pins.places == 2


def test_with_one_slot_nothing_can_be_pinned() -> None:
    with pytest.raises(PinLimitError, match=r"of 1 slot one must stay free .*\(pinned: none\)"):
        Pins(1).pin(1)


def test_a_name_of_the_settings_has_its_place_before_its_adapter_comes() -> None:
    pins = Pins(3, ["acme"])
    assert pins.places == 1
    pins.pin(7)
    with pytest.raises(PinLimitError, match=r"\(pinned: 7; reserved by the settings: acme\)"):
        pins.pin(8)
    assert pins.note(1, "acme")
    assert not pins.note(2, "globex")
    assert 1 in pins
    assert 2 not in pins
    assert pins.places == 2
    with pytest.raises(PinLimitError, match=r"\(pinned: 1, 7\)"):
        pins.pin(8)


def test_a_pin_by_name_and_by_call_is_one_pin() -> None:
    pins = Pins(3, ["acme"])
    pins.note(1, "acme")
    pins.pin(1)
    assert pins.places == 1
    pins.pin(2)
    assert pins.adapters == {1, 2}


def test_a_pin_by_call_becomes_the_pin_by_name_when_the_name_is_known() -> None:
    pins = Pins(3, ["acme"])
    pins.pin(1)
    assert pins.places == 2
    pins.note(1, "acme")
    assert pins.places == 1


def test_of_a_name_only_the_latest_version_is_pinned() -> None:
    pins = Pins(2, ["acme"])
    pins.note(1, "acme")
    pins.note(2, "acme")
    assert pins.adapters == {2}
    pins.forget(1)
    assert pins.adapters == {2}


def test_when_the_latest_version_of_a_name_has_left_the_one_before_is_pinned_again() -> None:
    """It serves on: the latest was refused."""
    pins = Pins(2, ["acme"])
    for number in (1, 2, 3):
        pins.note(number, "acme")
    pins.forget(2)
    pins.forget(3)
    assert pins.adapters == {1}
    assert pins.places == 1


def test_a_new_version_of_a_name_takes_over_the_pin_of_a_call_too() -> None:
    """Else the settings and calls together would pin every slot."""
    pins = Pins(4, ["acme"])
    pins.note(1, "acme")
    for adapter_id in (1, 2, 3):
        pins.pin(adapter_id)
    pins.note(9, "acme")
    assert pins.adapters == {9, 2, 3}
    assert pins.places == 3


def test_an_unloaded_adapter_takes_the_pin_of_a_call_along_and_leaves_the_settings_pin() -> None:
    pins = Pins(4, ["acme"])
    pins.note(1, "acme")
    pins.pin(2)
    pins.forget(1)
    pins.forget(2)
    assert pins.adapters == frozenset()
    assert pins.places == 1


def test_unpinning_takes_back_what_a_call_did() -> None:
    pins = Pins(3, ["acme"])
    pins.note(1, "acme")
    pins.pin(1)
    pins.unpin(1)
    pins.unpin(9)
    assert pins.adapters == {1}


def test_settings_that_pin_every_slot_are_refused() -> None:
    with pytest.raises(ConfigError, match="settings pin 2 adapters, and of 2 slots one must stay"):
        Pins(2, ["acme", "globex"])
    with pytest.raises(ConfigError, match="settings pin 1 adapter, and of 1 slot one must stay"):
        Pins(1, ["acme"])
