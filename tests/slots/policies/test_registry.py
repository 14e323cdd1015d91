"""Policies by name: built in, of installed packages, by `module:Class`."""

import importlib
from pathlib import Path

import pytest

from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.slots.policies.policy import PolicyError
from vllm_multilora.slots.policies.policy_registry import make_policy, policy_names

EXAMPLES = Path(__file__).parents[3] / "examples" / "cache_policy"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package that brings the policies `mine` and `broken`, and claims `lru`."""
    information = tmp_path / "third_party-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (information / "entry_points.txt").write_text(
        "[vllm_multilora.cache_policies]\n"
        "mine = third_party_policy:Mine\n"
        "broken = third_party_policy:Missing\n"
        "lru = third_party_policy:Mine\n"
    )
    (tmp_path / "third_party_policy.py").write_text(
        "from vllm_multilora.slots import CachePolicy\n"
        "class Mine:\n"
        "    def added(self, adapter_id, size, cost): pass\n"
        "    def used(self, adapter_ids, joined): pass\n"
        "    def removed(self, adapter_id): pass\n"
        "    def victim(self, candidates): return candidates[-1]\n"
        "class Halfway:\n"
        "    def added(self, adapter_id, size, cost): pass\n"
        "    def victim(self, candidates): return candidates[-1]\n"
        "class Abstract(CachePolicy): pass\n"
        "class Choosy(Mine):\n"
        "    def __init__(self, taste): pass\n"
        "CONSTANT = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def test_an_installed_package_adds_a_name_but_cannot_take_one_over(installed):
    assert "mine" in policy_names()
    assert make_policy("mine").victim((1, 2)) == 2
    assert policy_names().count("lru") == 1
    assert type(make_policy("lru")) is LruPolicy


def test_a_class_without_the_base_class_will_do(installed):
    assert make_policy("third_party_policy:Mine").victim((1, 2)) == 2


def test_the_example_is_a_policy_that_resists_a_scan(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    policy = make_policy("lru2_policy:Lru2Policy")
    for adapter_id in range(1, 6):
        policy.added(adapter_id, 1, 1.0)
    for adapter_id in (1, 2, 1, 2, 3, 4, 5):
        policy.used((adapter_id,), (adapter_id,))
    assert policy.victim(range(1, 6)) == 3
    assert policy.victim((1, 2)) == 1
    policy.removed(1)
    policy.added(1, 1, 1.0)
    assert policy.victim((1, 2)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lur", r"unknown cache policy 'lur'; did you mean 'lru'\? \(known: lru, lfu, .*module:Cl"),
        ("zzz", r"unknown cache policy 'zzz' \(known: lru, lfu, slru, gdsf.*\)"),
        ("no_such_module:Policy", "'no_such_module:Policy' cannot be imported: ModuleNotFoundErr"),
        ("third_party_policy:Nope", "cannot be imported: .*no attribute 'Nope'"),
        (":Policy", "must be a name or module:Class"),
        ("third_party_policy:CONSTANT", "must be a class, found int 3"),
        ("third_party_policy:Halfway", r"'third_party_policy:Halfway' \(Halfway\) lacks the methods"
         " used, removed"),
        ("third_party_policy:Abstract", "cannot be made without arguments: TypeError: .*abstract"),
        ("third_party_policy:Choosy", "cannot be made without arguments: TypeError: .*taste"),
        ("broken", "'broken': its entry point 'third_party_policy:Missing' cannot be imported"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_one_clear_sentence(installed, name, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(name)
