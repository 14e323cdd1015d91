"""A function waits for a module's import, and no import is caused or harmed by that."""

import importlib
import inspect
import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.post_import import when_imported

_numbers = itertools.count()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module that can be imported; returns its name, new in this process."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(source: str, package: str = "") -> str:
        name = f"late_module_{next(_numbers)}"
        folder = tmp_path
        if package:
            folder = tmp_path / package
            folder.mkdir()
            (folder / "__init__.py").write_text("")
        (folder / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        written.append(f"{package}.{name}" if package else name)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


def doubled(original, x):
    return 2 * original(x)


def patch_of(target: str) -> Patch:
    package, _, module = __name__.rpartition(".")
    return Patch("doubled", target, f"{module}:doubled", "test", ("0",), "never", package)


def test_a_patch_waits_for_its_module_and_is_there_before_anybody_uses_it(write):
    target = write("def value(x): return x\n")
    user = write(f"from {target} import value\n")
    patch = patch_of(f"{target}:value")
    patch.apply_on_import()
    assert target not in sys.modules
    assert importlib.import_module(user).value(3) == 6


def test_neither_the_module_nor_its_package_is_imported_for_waiting(write):
    target = write("", package="late_package")
    when_imported(target, lambda: None)
    assert target not in sys.modules
    assert "late_package" not in sys.modules


def test_a_module_that_is_there_already_is_patched_at_once(write):
    target = write("def value(x): return x\n")
    module = importlib.import_module(target)
    patch_of(f"{target}:value").apply_on_import()
    assert module.value(3) == 6


@pytest.mark.parametrize("name", ["no_such_module", "json.no_such_module", "no_such.module"])
def test_a_module_that_does_not_exist_is_said_at_once(name, caplog):
    patch_of(f"{name}:value").apply_on_import()
    [record] = caplog.records
    assert f"{name}:value is missing from this vLLM" in record.message


def test_an_import_does_not_fail_for_what_waits_for_it(write, caplog):
    target = write("x = 1\n")

    def fail() -> None:
        raise RuntimeError("of ours")

    called = []
    when_imported(target, fail)
    when_imported(target, lambda: called.append(1))
    assert importlib.import_module(target).x == 1
    assert called == [1]
    [record] = caplog.records
    assert target in record.message
    assert "of ours" in caplog.text


def test_an_import_that_fails_is_waited_for_again(write, tmp_path):
    target = write("raise ImportError('not today')\n")
    called = []
    when_imported(target, lambda: called.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(target)
    assert called == []
    (tmp_path / f"{target}.py").write_text("x = 'of another length'\n")
    importlib.invalidate_caches()
    importlib.import_module(target)
    assert called == [1]


def test_the_module_is_as_if_nobody_had_waited(write):
    source = "loader, spec_loader = __loader__, __spec__.loader\ndef value(x): return x\n"
    target, other = write(source), write(source)
    when_imported(target, lambda: None)
    module, plain = importlib.import_module(target), importlib.import_module(other)
    for found in (module.loader, module.spec_loader, module.__loader__, module.__spec__.loader):
        assert type(found) is type(plain.__loader__)
    assert inspect.getsource(module.value) == "def value(x): return x\n"
    assert importlib.reload(module) is module


def test_a_module_looked_up_but_not_imported_still_waits(write):
    target = write("")
    called = []
    when_imported(target, lambda: called.append(1))
    spec = importlib.util.find_spec(target)
    assert spec.loader.get_source(target) == ""
    assert called == []
    importlib.import_module(target)
    assert called == [1]


def test_threads_that_import_together_all_see_the_patch(write):
    threads, rounds = 8, 25
    for _ in range(rounds):
        target = write("import time\ntime.sleep(0.001)\ndef value(x): return x\n")
        patch = patch_of(f"{target}:value")
        together = threading.Barrier(threads)

        def use(number: int, target=target, patch=patch, together=together) -> int:
            patch.apply_on_import()
            together.wait(timeout=10)
            return importlib.import_module(target).value(number)

        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(use, range(threads))) == [2 * n for n in range(threads)]


def test_registering_imports_nothing_that_only_workers_use():
    """Which would cost every start of an API server and of an engine core its time."""
    code = (
        "import sys, vllm.logger\n"
        "vllms = set(sys.modules)\n"  # 0.31's has one of the engine's
        "from vllm_multilora.plugin import register\n"
        "register()\n"
        "late = sys.modules.keys() - vllms\n"
        "late = [m for m in late if m.startswith(('vllm.v1', 'vllm.lora', 'vllm.model'))]\n"
        "assert not late, late\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
