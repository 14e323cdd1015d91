"""A patch replaces its target once, and leaves vLLM alone where the target is missing."""

import sys
import types

import pytest

from vllm_multilora.integration.patching import Patch
from vllm_multilora.integration.version import is_supported


@pytest.fixture
def target(monkeypatch):
    module = types.ModuleType("patch_target")

    class Thing:
        @staticmethod
        def static(x):
            return x

        @classmethod
        def made_by(cls, x):
            return cls.__name__, x

        def method(self, x):
            return x

    class Derived(Thing):
        pass

    module.Thing, module.Derived = Thing, Derived
    monkeypatch.setitem(sys.modules, "patch_target", module)
    return module


def doubling(attribute: str) -> Patch:
    calls = []

    def replace(original):
        calls.append(original)

        def doubled(*args):
            return original(*args[:-1], args[-1] * 2)

        return doubled

    patch = Patch("double", f"patch_target:{attribute}", "test", "0", "never", replace)
    object.__setattr__(patch, "calls", calls)
    return patch


def test_functions_of_all_kinds_are_replaced(target):
    assert all(doubling(f"Thing.{name}").apply() for name in ("static", "made_by", "method"))
    assert target.Thing.static(2) == 4
    assert target.Thing.made_by(2) == ("Thing", 4)
    assert target.Derived.made_by(2) == ("Derived", 4)
    assert target.Thing().method(2) == 4


def test_applying_twice_changes_nothing(target):
    patch = doubling("Thing.method")
    assert patch.apply()
    assert patch.apply()
    assert patch.is_applied()
    assert len(patch.calls) == 1
    assert target.Thing().method(2) == 4


@pytest.mark.parametrize("attribute", ["Gone.method", "Thing.gone", "gone"])
def test_a_missing_target_is_said_once_and_nothing_else_happens(target, attribute, caplog):
    patch = doubling(attribute)
    assert not patch.apply()
    assert not patch.is_applied()
    [record] = caplog.records
    assert f"patch_target:{attribute} is missing from this vLLM" in record.message
    assert target.Thing().method(2) == 2


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.30.2", False),
        ("0.31.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc1", True),
        ("0.34.0", False),
        ("1.32.0", False),
        ("dev", False),
        (None, False),
    ],
)
def test_supported_versions(version, supported):
    assert is_supported(version) is supported
