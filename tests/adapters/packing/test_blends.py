"""What is a blend, and what is none: names, weights, numbers and texts."""

import json
import math

import pytest

from vllm_multilora.adapters.blend import (
    FIRST_NUMBER,
    MAX_PARTS,
    Blend,
    BlendError,
    BlendPart,
    folders_of,
    is_blend,
    title,
    weights_in,
)

STYLE = BlendPart(7, "style", "/adapters/style", 0.7)
DOMAIN = BlendPart(3, "domain", "/adapters/domain", 0.5)


def test_the_order_in_which_parts_are_named_does_not_matter():
    one, other = Blend.of([STYLE, DOMAIN]), Blend.of([DOMAIN, STYLE])
    assert one == other
    assert (one.name, one.number, one.source) == (other.name, other.number, other.source)
    assert one.name == "0.5*domain+0.7*style"


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0.0, -0.0)], ids=["whole", "zero"])
def test_a_weight_makes_the_same_blend_in_whatever_notation(one, other):
    """A request's number and the text that the engine reads give one blend."""
    found = [Blend.of([BlendPart(7, "style", "/adapters/style", each)]) for each in (one, other)]
    assert len({(blend.name, blend.number, blend.source) for blend in found}) == 1


@pytest.mark.parametrize(
    "other",
    [
        [STYLE],
        [STYLE, BlendPart(3, "domain", "/adapters/domain", 0.5000001)],
        [STYLE, BlendPart(4, "domain", "/adapters/domain", 0.5)],
        [BlendPart(7, "style", "/adapters/style", 0.5), BlendPart(3, "domain", "/d", 0.7)],
    ],
    ids=["fewer-parts", "weight", "version", "weights-swapped"],
)
def test_whatever_changes_the_sum_changes_the_number(other):
    blend = Blend.of([STYLE, DOMAIN])
    assert Blend.of(other).number != blend.number
    assert blend.number >= FIRST_NUMBER  # which no adapter of its own has


def test_a_blend_is_what_its_text_says():
    blend = Blend.of([STYLE, DOMAIN, BlendPart(1, "été ☀", "/a b/é", -1)])
    assert Blend.read(blend.source) == blend
    assert is_blend(blend.source)
    assert folders_of(blend.source) == ("/adapters/domain", "/adapters/style", "/a b/é")
    assert title(blend.source) == blend.name == "0.5*domain+0.7*style+-1*été ☀"


@pytest.mark.parametrize(
    "text",
    ["blend:", "blend:{}", "blend:[]", "blend:[[1]]", 'blend:[["a","b","c","d"]]'],
)
def test_a_text_that_only_begins_like_a_blend_is_refused(text):
    with pytest.raises(BlendError):
        Blend.read(text)


def test_names_cannot_be_mistaken_for_several_parts():
    tricky = Blend.of([BlendPart(1, "a+1*b", "/a", 1.0)])
    plain = Blend.of([BlendPart(1, "a", "/a", 1.0), BlendPart(2, "b", "/b", 1.0)])
    assert tricky.name == "1*a%2B1%2Ab"
    assert plain.name == "1*a+1*b"


def test_digests_tell_weights_versions_and_numbers_of_parts_apart():
    blend = Blend.of([STYLE, DOMAIN])
    digests = ["a" * 64, "b" * 64]
    found = {
        blend.digest(digests),
        blend.digest(digests[::-1]),
        Blend.of([STYLE, BlendPart(3, "domain", "/adapters/domain", 0.6)]).digest(digests),
        Blend.of([STYLE]).digest(digests[:1]),
    }
    assert len(found) == 4
    assert all(len(digest) == 64 for digest in found)
    # By what an adapter contains: its name, number and folder are no matter.
    elsewhere = Blend.of([BlendPart(1, "s", "/t", 0.7), BlendPart(2, "d", "/e", 0.5)])
    assert elsewhere.digest(digests) == blend.digest(digests)
    assert len(blend.version(["x" * 5000, "y"])) < 100


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("style", "found 'style', expected a weight for each adapter"),
        (["style"], "found ['style']"),
        (7, "found 7"),
        ({}, "found 0 adapters, expected 1 to 8"),
        ({f"a{number}": 1 for number in range(MAX_PARTS + 1)}, "found 9 adapters"),
        ({"": 1}, "found '' for an adapter's name"),
        ({"a": "1"}, "found '1' for 'a', expected a weight: a number from -100 to 100"),
        ({"a": True}, "found True for 'a'"),
        ({"a": None}, "found None for 'a'"),
        ({"a": [1]}, "found [1] for 'a'"),
        ({"a": math.nan}, "found nan for 'a'"),
        ({"a": math.inf}, "found inf for 'a'"),
        ({"a": -100.5}, "found -100.5 for 'a'"),
        ({"a": 10**400}, "for 'a', expected a weight"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_blend_is_refused_exactly(value, found):
    with pytest.raises(BlendError) as refused:
        weights_in(value)
    assert found in str(refused.value)
    assert len(str(refused.value)) < 500


def test_weights_are_numbers_in_whatever_notation():
    weights = weights_in(json.loads('{"a": 1, "b": 5e-1, "c": -0.0}'))
    assert weights == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert math.copysign(1.0, weights["c"]) == 1.0
    most = {f"a{number}": 0.5 for number in range(MAX_PARTS)}
    assert weights_in(most) == most


def test_no_adapter_comes_twice():
    with pytest.raises(BlendError, match="found 'style' twice"):
        Blend.of([STYLE, STYLE])
