"""A patch replaces its target once, and leaves vLLM alone where the target is missing."""

import asyncio
import functools
import inspect
import subprocess
import sys
import types
from dataclasses import replace

import pytest

from vllm_multilora.integration.patching import patch as patch_module
from vllm_multilora.integration.patching import version as version_module
from vllm_multilora.integration.patching.parts import CORE, Part
from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.tables.ledger import PATCHES
from vllm_multilora.integration.patching.version import installed_version, is_expected


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

        async def later(self, x):
            return x

    class Named:
        def __init__(self, name):
            self.name = name

    class Derived(Thing):
        pass

    module.Thing, module.Derived, module.Named = Thing, Derived, Named
    monkeypatch.setitem(sys.modules, "patch_target", module)
    return module


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """A module with handlers, below a package of its own."""
    module = types.ModuleType("patching_package.handlers")

    def doubled(original, *args):
        return original(*args[:-1], args[-1] * 2)

    async def doubled_later(original, *args):
        return await original(*args[:-1], args[-1] * 2)

    def made_twice(original, name):
        return original(name * 2)

    module.doubled, module.doubled_later, module.made_twice = doubled, doubled_later, made_twice
    monkeypatch.setitem(sys.modules, module.__name__, module)
    patch_module._tell.cache_clear()
    return module


def patch_of(attribute: str, handler: str = "handlers:doubled", *takes: str) -> Patch:
    return Patch(
        name="double",
        target=f"patch_target:{attribute}",
        handler=handler,
        why="test",
        checked=("0",),
        until="never",
        package="patching_package",
        takes=takes,
    )


def test_functions_of_all_kinds_are_replaced_and_look_like_their_originals(target):
    signature = inspect.signature(target.Thing.method)
    assert all(patch_of(f"Thing.{name}").apply() for name in ("static", "made_by", "method"))
    assert target.Thing.static(2) == 4
    assert target.Thing.made_by(2) == ("Thing", 4)
    assert target.Derived.made_by(2) == ("Derived", 4)
    assert target.Thing().method(2) == 4
    assert inspect.signature(target.Thing.method) == signature
    assert patch_of("Thing.later", "handlers:doubled_later").apply()
    assert inspect.iscoroutinefunction(target.Thing.later)
    assert asyncio.run(target.Thing().later(2)) == 4
    assert patch_of("Named", "handlers:made_twice").apply()
    assert target.Named("ab").name == "abab"
    assert target.Named.__name__ == "Named"


def test_applying_twice_changes_nothing(target):
    patch = patch_of("Thing.method")
    assert patch.apply()
    assert patch.apply()
    assert target.Thing().method(2) == 4


def test_a_handler_is_imported_when_its_target_is_first_called(target, monkeypatch):
    handlers = sys.modules.pop("patching_package.handlers")
    assert patch_of("Thing.method").apply()
    monkeypatch.setitem(sys.modules, "patching_package.handlers", handlers)
    assert target.Thing().method(2) == 4


@pytest.mark.parametrize("handler", ["nowhere:doubled", "handlers:gone"])
def test_in_an_unknown_vllm_a_handler_that_cannot_be_imported_leaves_stock_in_place(
    target, monkeypatch, caplog, handler
):
    monkeypatch.setattr(patch_module, "installed_version", lambda: "0.99.0")
    assert patch_of("Thing.method", handler, "self, x").apply()
    assert [target.Thing().method(2) for _ in range(3)] == [2, 2, 2]
    [record] = caplog.records
    assert f"{handler} cannot be imported" in record.message


def test_in_a_known_vllm_a_handler_that_cannot_be_imported_is_a_fault(target, monkeypatch):
    monkeypatch.setattr(patch_module, "installed_version", lambda: "0.32.0")
    assert patch_of("Thing.method", "nowhere:doubled").apply()
    with pytest.raises(ImportError, match="patching_package"):
        target.Thing().method(2)


def test_what_is_first_called_when_python_ends_runs_as_vllm_has_it():
    """vLLM's engines shut down in their `__del__`, when nothing can be imported."""
    script = """
import os, sys, types
from vllm_multilora.integration.patching import patch

patch.installed_version = lambda: "0.32.0"

class Engine:
    def shutdown(self):
        os.write(1, b"shut down")

    def __del__(self):
        self.shutdown()

sys.modules["target"] = types.ModuleType("target")
sys.modules["target"].Engine = Engine
entry = patch.Patch("end", "target:Engine.shutdown", "nowhere:shutdown", "test", "never")
assert entry.apply()
engine = Engine()
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (run.stdout, run.stderr) == ("shut down", "")


@pytest.mark.parametrize("attribute", ["Gone.method", "Thing.gone", "gone"])
def test_a_missing_target_is_said_once_and_nothing_else_happens(target, attribute, caplog):
    patch = patch_of(attribute)
    assert not any(patch.apply() for _ in range(2))
    [record] = caplog.records
    assert f"patch_target:{attribute} is missing from this vLLM" in record.message
    assert target.Thing().method(2) == 2


def keyed(self, x, *, by=1, of=Ellipsis):
    return x


class Holder:
    keyed = keyed
    ready = property(lambda self: 1)
    cached = functools.cached_property(lambda self: 1)


@pytest.mark.parametrize(
    ("attribute", "takes", "problem"),
    [
        pytest.param("keyed", "self, x, *, by=1, of=Kind.ALL", None, id="default-of-vllms"),
        pytest.param("keyed", "self, x, *, by=2, of=Kind.ALL", "takes (self, x, ", id="default"),
        pytest.param("keyed", "self, x, *, by=1", "takes (self, x, ", id="one-more"),
        pytest.param("keyed", "self, y, *, by=1, of=Kind.ALL", "takes (self, x, ", id="name"),
        pytest.param("ready", "self", None, id="property"),
        pytest.param("cached", "self", "it is no function", id="another-kind"),
    ],
)
def test_in_an_unknown_vllm_a_target_that_takes_something_else_stays(
    target, monkeypatch, caplog, attribute, takes, problem
):
    target.Holder = Holder
    original = Holder.__dict__[attribute]
    monkeypatch.setattr(Holder, attribute, original)  # puts it back
    monkeypatch.setattr(patch_module, "installed_version", lambda: "0.99.0")
    patch = patch_of(f"Holder.{attribute}", "handlers:doubled", "nothing", takes)
    assert patch.apply() is (problem is None)
    assert (Holder.__dict__[attribute] is not original) is (problem is None)
    assert [problem in record.message for record in caplog.records] == [True] * bool(problem)
    if problem:
        assert Holder().cached == 1
        assert Holder().keyed(2, by=3) == 2
    caplog.clear()
    monkeypatch.setattr(patch_module, "installed_version", lambda: "0.32.0")
    assert patch.apply()
    assert not caplog.records


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.28.2", False),
        ("0.29.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc1", True),
        ("0.34.0", False),
        ("1.32.0", False),
        ("dev", False),
        (None, False),
    ],
)
def test_supported_versions(version, supported):
    assert CORE.is_tested(version) is supported


@pytest.mark.parametrize(
    ("version", "is_newer"),
    [("0.30.2", False), ("0.33.9", False), ("0.34.0rc1", True), ("1.0", True), ("dev", False)],
)
def test_versions_after_the_last_tested_one_are_newer(version, is_newer):
    part = Part("one", "what it does", (0, 31), (0, 33))
    assert part.is_newer(version) is is_newer
    assert part.tested == "0.31 to 0.33"


def test_vllms_version_is_read_from_disk_once(monkeypatch):
    installed = installed_version()
    monkeypatch.setattr(version_module, "distributions", lambda: iter(()))
    assert installed_version() == installed is not None


@pytest.mark.parametrize(
    ("target", "versions"),
    [
        ("vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request", "0.31 0.33 dev"),
        ("vllm.v1.core.sched.scheduler:Scheduler._is_blocked_waiting_status", "0.29 0.30"),
        ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "0.29 0.30 0.31 0.33 dev"),
    ],
)
def test_what_only_some_versions_have_is_expected_of_these(target, versions):
    known = ("0.29", "0.30", "0.31", "0.33", "dev")
    found = [version for version in known if is_expected(target, f"{version}.0+cpu")]
    assert found == versions.split()


def test_a_patch_of_what_a_version_never_had_is_not_missed(monkeypatch, caplog):
    target = "vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request"
    patch = replace(PATCHES[0], target=target)
    monkeypatch.setattr(patch_module, "installed_version", lambda: "0.30.0")
    monkeypatch.setattr(patch_module.importlib, "import_module", None)  # would be called to apply
    assert patch.apply()
    assert not caplog.records
