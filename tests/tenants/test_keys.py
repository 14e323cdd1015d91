"""A key is found at one price, whether it is right or wrong, and however many there are."""

import hashlib

import pytest

from vllm_multilora.tenants import keys
from vllm_multilora.tenants.keys import (
    MAX_KEY_LENGTH,
    KeyRing,
    can_be_sent,
    digest_of,
    read_stored,
    stored,
)


def ring(count: int) -> KeyRing[int]:
    return KeyRing({digest_of(f"key-{number}"): number for number in range(count)})


@pytest.mark.parametrize(
    "key",
    [
        "",
        "key-100",
        "KEY-1",
        "key-1 ",
        "key-1\0",
        stored("key-1"),
        "\udcff",
        "k" * (MAX_KEY_LENGTH + 1),
        "é" * MAX_KEY_LENGTH,
    ],
    ids=ascii,
)
def test_other_keys_are_nobodys(key):
    assert ring(100).owner(key) is None


def test_a_header_without_a_key_is_nobodys_whatever_the_file_has():
    """The hash of no text is what a script writes that has hashed an empty variable."""
    assert KeyRing({digest_of(""): "acme"}).owner("") is None


@pytest.mark.parametrize(
    ("key", "can"),
    [
        ("k" * MAX_KEY_LENGTH, True),
        ("k" * (MAX_KEY_LENGTH + 1), False),
        ("", False),
        ("é", False),
        ("a key\n", False),
        ("key\x07", False),
    ],
    ids=["longest", "too long", "empty", "accented", "lines", "control"],
)
def test_a_key_can_be_sent_in_a_header_and_found(key, can):
    assert can_be_sent(key) == can
    assert not can or KeyRing({digest_of(key): 1}).owner(key) == 1


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:zz", "a" * 64, stored("key").upper(), stored("key") + "ab"]
)
def test_what_is_no_stored_key_is_refused(text):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        read_stored(text)


class Counted:
    """Counts what is hashed."""

    def __init__(self):
        self.calls, self.bytes = 0, 0

    def __call__(self, function):
        def call(data, **options):
            self.calls += 1
            self.bytes += len(data)
            return function(data, **options)

        return call


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize(
    ("key", "hashed"), [("key-0", 5), ("wrong", 5), ("w" * MAX_KEY_LENGTH, MAX_KEY_LENGTH)]
)
def test_a_look_up_hashes_the_key_once_and_its_digest_once(monkeypatch, count, key, hashed):
    found, work = ring(count), Counted()
    monkeypatch.setattr(keys.hashlib, "sha256", work(hashlib.sha256))
    monkeypatch.setattr(keys.hashlib, "blake2b", work(hashlib.blake2b))
    found.owner(key)
    assert (work.calls, work.bytes) == (2, hashed + 32)


def test_a_long_wrong_key_is_not_hashed(monkeypatch):
    found, work = ring(1), Counted()
    monkeypatch.setattr(keys.hashlib, "sha256", work(hashlib.sha256))
    found.owner("w" * 60_000)
    assert work.calls == 0
