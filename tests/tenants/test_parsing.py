"""A tenants file says what each tenant may do, or exactly what is wrong with it."""

import re
from pathlib import Path

import pytest

from vllm_multilora.documents import DocumentError
from vllm_multilora.tenants.keys import digest_of, stored
from vllm_multilora.tenants.tenant import AllowedNames, Tenant, TenantLimits
from vllm_multilora.tenants.tenants_file import parse_tenants

KEY, OTHER = stored("sk-one"), stored("sk-two")
FULL = f"""
cache_salt: 0123456789abcdef0123456789abcdef
tenants:
  acme:
    keys: ["{KEY}", "{OTHER}"]
    adapters: [acme-*, legal]
    allow: [media, grammars]
    routes: [support]
    base_model: true
    weight: 2.5
    limits:
      {{running: 4, waiting: 0, tokens_per_minute: 60000, adapters: 3, resident: 5, answers: 7}}
  small:
    keys: ["{stored("sk-three")}"]
"""


def test_everything_is_read():
    found = parse_tenants("tenants.yaml", FULL)
    assert found.by_name["acme"] == Tenant(
        "acme",
        AllowedNames(("acme-*", "legal")),
        AllowedNames(("support",)),
        base_model=True,
        weight=2.5,
        limits=TenantLimits(4, 0, 60000, 3, 5, 7),
        allow=frozenset({"media", "grammars"}),
    )
    assert found.by_name["small"] == Tenant("small")
    assert found.keys[digest_of("sk-one")] == found.keys[digest_of("sk-two")] == "acme"
    assert found.keys[digest_of("sk-three")] == "small"
    assert found.cache_salt == "0123456789abcdef0123456789abcdef"


def test_no_tenants_are_fine():
    assert not parse_tenants("tenants.yaml", "tenants: {}").by_name


def test_names_are_exact_or_beginnings():
    names = AllowedNames(("acme-*", "legal"))
    assert "acme-1" in names
    assert "acme-" in names
    assert "legal" in names
    assert not any(name in names for name in ("acme", "legal2", "Legal", "xacme-1", "", None, 7))
    assert "anything" in AllowedNames(("*",))
    assert "anything" not in AllowedNames()


def test_limits_are_divided_among_servers_and_rounded_up():
    assert TenantLimits(4, 5, 60000, 3, 5, 7).divided(3) == TenantLimits(2, 2, 20000, 3, 5, 3)
    assert TenantLimits(1, 0, 100, 1).divided(8) == TenantLimits(1, 0, 12.5, 1)
    assert TenantLimits().divided(4) == TenantLimits()


def tenant(text):
    return f'tenants: {{acme: {{keys: ["{KEY}"], {text}}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected tenants, cache_salt"),
        ("{}", "found no key tenants"),
        ("tenants: [a]", "found a list, expected tenants by name"),
        ("tenant: {}", "did you mean 'tenants'"),
        ("tenants: {}\ncache_salt: short", "cache_salt: found a text of 5 characters"),
        ("tenants: {}\ncache_salt: 7", "cache_salt: found 7, expected at least 32"),
        ("tenants: {a b: {}}", "tenants.a b: found this name, expected 1 to 64 ASCII letters"),
        ("tenants: {../x: {}}", "expected 1 to 64 ASCII letters"),
        (f"tenants: {{{'a' * 65}: {{}}}}", "expected 1 to 64 ASCII letters"),
        ("tenants: {a: {}}", "tenants.a.keys: found nothing, expected a list of hashed keys"),
        ("tenants: {a: {keys: []}}", "at least one"),
        ("tenants: {a: {keys: [sk-secret]}}", "vllm-multilora tenants hash makes one"),
        (
            f'tenants: {{a: {{keys: ["{KEY}"]}}, b: {{keys: ["{KEY}"]}}}}',
            "tenants.b.keys.0: found a key that 'a' has, too",
        ),
        (tenant("kyes: []"), "tenants.acme.kyes: found an unknown key.*did you mean 'keys'"),
        (tenant("adapters: all"), "found a text of 3 characters, expected a list of names"),
        (tenant('adapters: ["a*b"]'), "one \\* at its end"),
        (tenant("adapters: [7]"), "adapters.0: found 7"),
        (tenant("base_model: 1"), "base_model: found 1, expected true or false"),
        (tenant("weight: 0"), "weight: found 0, expected a number above 0"),
        (tenant("weight: .nan"), "expected a number above 0"),
        (tenant("weight: 1e308"), "expected a number above 0, at most 1000000000"),
        (tenant(f"weight: {'9' * 400}"), "weight: found a value that YAML reads as int, but"),
        (tenant(f"limits: {{tokens_per_minute: {'9' * 400}}}"), "not a valid one of up to 64 bits"),
        ("tenants: {a: {keys: [!!int sk-secret]}}", "tenants.a.keys.0: found a value that YAML"),
        (tenant("limits: {running: 0}"), "limits.running: found 0, expected a whole number of 1"),
        (tenant("limits: {waiting: -1}"), "expected a whole number of 0 or more"),
        (tenant("limits: {tokens: 1}"), "limits.tokens: found an unknown key"),
        (tenant("allow: media"), "allow: found a text of 5 characters, expected a list of media"),
        (
            tenant("allow: [grammar]"),
            "allow.0: found a text of 7 characters, expected one of media",
        ),
        (tenant("allow: [media, 7]"), "allow.1: found 7, expected one of media, grammars"),
        (tenant('adapters: [""]'), "adapters.0: found a text of 0 characters"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, message):
    with pytest.raises(DocumentError, match=message) as caught:
        parse_tenants("tenants.yaml", text)
    assert "tenants.yaml" in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_the_example_in_the_docs_can_be_used():
    page = Path(__file__).parents[2] / "docs" / "security.md"
    (example,) = re.findall(r"^```yaml\n(tenants:\n.*?)^```$", page.read_text(), re.M | re.S)
    assert parse_tenants(page.name, example).by_name["acme"].limits.running == 8
