"""Seals say whose a request is, and nobody without the secret can make or change one."""

import pytest

from vllm_multilora.integration.seals import MAX_SEAL_CHARACTERS, Seal, opened, sealed
from vllm_multilora.integration.server.requests.callers import tenant_salt

SECRET = "0123456789abcdef"
SEALS = {
    "tenant": Seal("acme", 2.0, None, "salt"),
    "weight": Seal("acme", 0.333333, 7, "salt"),
    "longest": Seal("a" * 64, 1.23457e-05, 99_999_999, "s" * 20),
    "operator": Seal(),
    "operator-with-salt": Seal(salt="salt"),
}


@pytest.mark.parametrize("seal", SEALS.values(), ids=SEALS)
def test_seal_when_opened_with_its_secret_says_what_was_sealed(seal):
    text = sealed(SECRET, seal)
    assert opened(SECRET, text) == seal
    assert len(text) <= MAX_SEAL_CHARACTERS
    assert set("@/\\\0~ ").isdisjoint(text)  # vLLM takes none of the first four in a salt


@pytest.mark.parametrize("seal", SEALS.values(), ids=SEALS)
def test_seal_when_any_character_differs_is_none(seal):
    text = sealed(SECRET, seal)
    for at in range(len(text)):
        assert (
            opened(SECRET, f"{text[:at]}{'b' if text[at] != 'b' else 'c'}{text[at + 1 :]}") is None
        )
    assert opened(SECRET[::-1], text) is None


@pytest.mark.parametrize(
    "text", [None, "", ":", "::::", "a" * 200, "acme:1:::é", "a tenant's salt"]
)
def test_other_text_when_opened_is_no_seal(text):
    assert opened(SECRET, text) is None


def test_salts_when_tenant_secret_or_own_salt_differ_are_different():
    whose = [("s", "acme", None), ("s", "acme", ""), ("s", "acme", "a"), ("s", "zen", None)]
    whose += [("t", "acme", None), ("s", "", "a"), ("s", "", "b")]
    assert len({tenant_salt(*each) for each in whose}) == len(whose)
