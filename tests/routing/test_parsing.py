"""What a routes file may hold, and what it is told when it holds something else."""

import json
import sys

import pytest
import yaml

from vllm_multilora.documents import DocumentError
from vllm_multilora.routing.request_facts import RequestFacts
from vllm_multilora.routing.route_targets import Blended, Turns
from vllm_multilora.routing.routes_file import parse_routes

FULL = """
routes:
  acme: acme-v7
  assistant:
    split: {v2-stable: 90, v3-candidate: 10}
    sticky: header:X-Customer
    fallback: v2-stable
  support:
    by: language
    cases:
      fr: support-fr
      "no": {split: {nordic-a: 1, nordic-b: 3}, fallback: [support-en, base]}
    default: {adapter: support-en, fallback: base}
"""


def candidates(text, route, file="routes.yaml", **facts):
    return parse_routes(file, text).targets[route].candidates(RequestFacts(**facts), Turns())


def test_every_form_of_target_is_read():
    assert candidates(FULL, "acme") == ("acme-v7",)
    chosen, *fallback = candidates(FULL, "assistant", headers={"x-customer": "c1"})
    assert chosen in ("v2-stable", "v3-candidate")
    assert set(fallback) <= {"v2-stable"}
    assert candidates(FULL, "support", metadata={"language": "fr"}) == ("support-fr",)
    nordic = candidates(FULL, "support", metadata={"language": "no"})
    assert nordic[0] in ("nordic-a", "nordic-b")
    assert nordic[1:] == ("support-en", "base")
    assert candidates(FULL, "support") == ("support-en", "base")


def test_fallbacks_of_inner_targets_come_before_those_around_them():
    text = """
    routes:
      r: {by: user, cases: {u: {adapter: a, fallback: b}}, fallback: [c, b]}
    """
    assert candidates(text, "r", user="u") == ("a", "b", "c")


def test_a_blend_is_one_candidate_before_its_fallbacks():
    text = """
    routes:
      r: {blend: {style: 0.7, domain: 1}, fallback: domain}
      s: {by: user, cases: {u: {blend: {domain: 1.0, style: 0.70}}}}
    """
    blend, *fallback = candidates(text, "r")
    assert blend == Blended((("domain", 1.0), ("style", 0.7)))
    assert fallback == ["domain"]
    assert candidates(text, "s", user="u") == (blend,)
    assert str(blend) == "1*domain+0.7*style"
    routes = parse_routes("routes.yaml", text)
    assert routes.unknown({"domain"}) == {"r": ["style"], "s": ["style"]}


@pytest.mark.parametrize(
    ("blend", "found"),
    [
        ("[style]", "routes.r.blend: found ['style'], expected a weight for each adapter"),
        ("{}", "routes.r.blend: found 0 adapters, expected 1 to 8"),
        ("{style: much}", "routes.r.blend: found 'much' for 'style', expected a weight"),
        ("{style: .nan}", "routes.r.blend: found nan for 'style'"),
        ("{r: 1}", "routes.r.blend.r: found the route 'r', expected an adapter"),
    ],
)
def test_what_is_no_blend_is_reported_with_its_place(blend, found):
    with pytest.raises(DocumentError) as refused:
        parse_routes("routes.yaml", f"routes: {{r: {{blend: {blend}}}}}")
    assert found in str(refused.value)


def test_json_means_the_same_as_yaml():
    data = {"routes": {"r": {"split": {"a": 1, "b": 0}, "fallback": "c"}}}
    assert candidates(json.dumps(data, indent="\t"), "r", "routes.json") == ("a", "c")
    assert candidates(json.dumps(data), "r", "routes.yaml") == ("a", "c")


def test_a_file_may_have_no_routes_yet():
    assert not parse_routes("routes.yaml", "routes: {}").targets


def test_anchors_and_merge_keys_share_what_routes_have_in_common():
    text = """
routes:
  a: &common
    split: {x: 1}
    fallback: base
  b:
    <<: &own
      <<: *common
      split: {y: 1}
  c: *own
"""
    assert candidates(text, "b") == candidates(text, "c") == ("y", "base")


def test_the_names_that_routes_need_and_nobody_serves_are_reported():
    unknown = parse_routes("routes.yaml", FULL).unknown(
        {"acme-v7", "v2-stable", "support-en", "support-fr"}
    )
    assert unknown == {"assistant": ["v3-candidate"], "support": ["nordic-a", "nordic-b", "base"]}


def test_a_route_may_not_have_the_name_of_something_that_is_served():
    with pytest.raises(DocumentError, match=r"routes.yaml, line 3, routes.acme: .* an adapter"):
        parse_routes("routes.yaml", FULL).check_names({"acme"}, "an adapter")


BROKEN = {
    "no-yaml": ("routes: a: b", 1, "", "invalid YAML"),
    "tab": ("routes:\n\ta: b", 2, "", "invalid YAML"),
    "empty": ("", None, "", "found nothing, expected one key, routes"),
    "list": ("- a", 1, "", "expected one key, routes"),
    "other-key": ("version: 1\nroutes: {}", 1, "", "found version, routes, expected one key"),
    "null": ("routes:", 1, "routes", "found nothing, expected routes by name"),
    "list-of-routes": ("routes: [a]", 1, "routes", "expected routes by name"),
    "empty-name": ('routes:\n  "": a', 1, "routes", "empty name"),
    "twice": ("routes:\n  a: x\n  a: y", 3, "routes.a", "found this key twice, first in line 2"),
    "norway": (
        "routes:\n  r:\n    by: language\n    cases:\n      no: a",
        *(5, "routes.r.cases", "found the key no, which YAML reads as False, expected text: write"),
    ),
    "list-as-key": ("routes: {[a]: b}", 1, "routes", "found the key"),
    "number-as-name": ("routes:\n  r: 7", 2, "routes.r", "found 7, expected an adapter's name"),
    "target-list": ("routes:\n  r: [a]", 2, "routes.r", "found ['a'], expected an adapter's name"),
    "null-target": ("routes:\n  r:", 2, "routes.r", "found nothing, expected an adapter's name"),
    "empty-target": ("routes:\n  r: {}", 2, "routes.r", "found an empty mapping, expected"),
    "typo": ("routes:\n  r:\n    splits: {a: 1}", 3, "routes.r.splits", "did you mean 'split'?"),
    "two-kinds": (
        "routes:\n  r: {split: {a: 1}, by: user, cases: {x: a}}",
        *(2, "routes.r", "found split and by, expected"),
    ),
    "only-fallback": ("routes:\n  r: {fallback: a}", 2, "routes.r", "found fallback, expected"),
    "sticky-without-split": (
        "routes:\n  r: {adapter: a, sticky: user}",
        *(2, "routes.r.sticky", "found sticky without split"),
    ),
    "cases-without-by": (
        "routes:\n  r:\n    split: {a: 1}\n    cases: {x: a}",
        *(4, "routes.r.cases", "found cases without by"),
    ),
    "empty-split": ("routes:\n  r: {split: {}}", 2, "routes.r.split", "a weight for each adapter"),
    "split-list": ("routes:\n  r: {split: [a, b]}", 2, "routes.r.split", "a weight for each"),
    "text-weight": (
        "routes:\n  r:\n    split:\n      a: 90%",
        *(4, "routes.r.split.a", "found '90%', expected a weight: a number of 0 or more"),
    ),
    "negative-weight": ("routes:\n  r: {split: {a: -1}}", 2, "routes.r.split.a", "found -1"),
    "endless-weight": ("routes:\n  r: {split: {a: .inf}}", 2, "routes.r.split.a", "found inf"),
    "no-number": ("routes:\n  r: {split: {a: .nan}}", 2, "routes.r.split.a", "found nan"),
    "true-weight": ("routes:\n  r: {split: {a: true}}", 2, "routes.r.split.a", "found True"),
    "zero-weights": ("routes:\n  r: {split: {a: 0}}", 2, "routes.r.split", "weights of 0 only"),
    "huge-weight": (
        "routes:\n  r: {split: {a: 1e308, b: 1e308}}",
        *(2, "routes.r.split.a", "at most 1000000000"),
    ),
    "no-such-day": (
        "routes:\n  r:\n    by: user\n    cases: {x: a}\n    default: 2026-02-30",
        *(5, "routes.r.default", "reads as timestamp, but it is not a valid one; write text in"),
    ),
    "no-such-day-as-key": (
        "routes:\n  2026-13-01: a",
        *(2, "routes", "reads as timestamp, but it is not a valid one"),
    ),
    "no-digits": ("routes:\n  r: {split: {a: 0x_}}", 2, "routes.r.split.a", "reads as int, but"),
    "tagged-int": ("routes:\n  r: !!int zz", 2, "routes.r", "reads as int, but it is not"),
    "tagged-float": ("routes:\n  r: !!float abc", 2, "routes.r", "reads as float, but"),
    "tagged-bool": ("routes:\n  r: !!bool x", 2, "routes.r", "reads as bool, but"),
    "many-digits": (
        f"routes:\n  r: {{split: {{a: {'9' * 400}}}}}",
        *(2, "routes.r.split.a", "reads as int, but it is not a valid one of up to 64 bits"),
    ),
    "more-digits-than-can-be-shown": (
        f"routes:\n  r: 0x{'f' * 5000}",
        *(2, "routes.r", "not a valid one of up to 64 bits"),
    ),
    "deep": ("routes: " + "[" * 990 + "]" * 990, None, "", "are nested too deeply"),
    "no-cases": ("routes:\n  r: {by: user}", 2, "routes.r.cases", "a target for each value"),
    "same-case": (
        "routes:\n  r:\n    by: user\n    cases: {A: x, a: y}",
        *(4, "routes.r.cases.a", "found this value twice"),
    ),
    "source": (
        "routes:\n  r:\n    by: cookie:x\n    cases: {a: x}",
        *(3, "routes.r.by", "found 'cookie:x', expected user, language, metadata:NAME or header:"),
    ),
    "unnamed-source": (
        "routes:\n  r: {split: {a: 1}, sticky: 'header:'}",
        *(2, "routes.r.sticky", "expected user, language"),
    ),
    "no-fallback": (
        "routes:\n  r: {adapter: a, fallback: []}",
        *(2, "routes.r.fallback", "found no name"),
    ),
    "mapping-as-fallback": (
        "routes:\n  r: {adapter: a, fallback: {b: 1}}",
        *(2, "routes.r.fallback", "expected an adapter's name or a list"),
    ),
    "chain": ("routes:\n  a: b\n  b: c", 2, "routes.a", "found the route 'b', expected an adapter"),
    "chain-in-split": ("routes:\n  a: {split: {a: 1}}", 2, "routes.a.split.a", "found the route"),
    "self-containing": (
        "routes: &all\n  a: *all",
        2,
        "routes.a",
        "alias of an object that contains it",
    ),
}


@pytest.fixture
def usual_recursion_limit():
    """Libraries that other tests import raise it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("usual_recursion_limit")
@pytest.mark.parametrize("name", BROKEN)
def test_an_error_names_file_line_and_key_and_says_what_is_expected(name):
    text, line, key, message = BROKEN[name]
    place = "".join([f", line {line}" if line else "", f", {key}" if key else ""])
    with pytest.raises(DocumentError) as caught:
        parse_routes("routes.yaml", text)
    assert str(caught.value).startswith(f"routes.yaml{place}: ")
    assert message in str(caught.value)


def test_values_read_alike_whatever_libraries_do_to_pyyaml(monkeypatch):
    """lm-format-enforcer makes dates text for all."""
    shared = yaml.SafeLoader.yaml_constructors
    monkeypatch.setitem(shared, "tag:yaml.org,2002:timestamp", shared["tag:yaml.org,2002:str"])
    with pytest.raises(DocumentError, match="reads as timestamp"):
        parse_routes("routes.yaml", "routes: {r: 2026-02-30}")


_TOO_LONG = "routes.json: found a whole number of more than 64 bits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"routes": {"r": "a",}}', "routes.json, line 1: found invalid JSON: "),
        ('{"routes":\n {"r": "a", "r": "b"}}', "routes.json: found the key 'r' twice"),
        ('{"routes": {"r": {"split": {"a": "x"}}}}', "routes.json, routes.r.split.a: found 'x'"),
        ('{"routes": ' + "[" * 100_000, "routes.json: found lists or mappings that are nested"),
        ('{"routes": {"r": {"split": {"a": %s}}}}' % ("9" * 400), _TOO_LONG),
        ('{"routes": {"r": {"split": {"a": %s}}}}' % ("9" * 5000), _TOO_LONG),
    ],
    ids=["syntax", "twice", "weight", "deep", "400-digits", "5000-digits"],
)
def test_errors_in_json_name_the_key(text, message):
    with pytest.raises(DocumentError) as caught:
        parse_routes("routes.json", text)
    assert str(caught.value).startswith(message)
