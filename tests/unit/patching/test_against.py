"""`doctor --against` reads another vLLM's source, follows its names, and says what differs."""

import contextlib
import importlib.util
import io
import shutil
import zipfile
from pathlib import Path

import pytest

from vllm_multilora.cli import main
from vllm_multilora.integration.patching.source import VllmSource

MODULES = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "__version__ = version = '0.40.1'\n",
    "vllm/base.py": "class Base:\n    def __init__(self, a: int, *, b='x'): ...\n",
    "vllm/sub/__init__.py": "from .inner import *\n",
    "vllm/sub/inner.py": "from vllm.base import Base\nclass Derived(Base[int]): ...\n",
}


@pytest.fixture(params=["folder", "package", "wheel"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> VllmSource:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if request.param == "wheel":
        wheel = tmp_path / "vllm-0.40.1-cp38-abi3-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in MODULES.items():
                archive.writestr(name, text)
        return VllmSource.open(wheel)
    return VllmSource.open(tmp_path if request.param == "folder" else tmp_path / "vllm")


@pytest.mark.parametrize(
    "content",
    [b"def newer[T=!]: ...", b"\x00", b"'\xff'", b"(" * 10_000],
    ids=["syntax", "null", "encoding", "depth"],
)
def test_a_file_that_this_python_cannot_read_is_named(content, tmp_path, capsys):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    (tmp_path / "vllm/config.py").write_bytes(content)
    assert main(["doctor", "--against", str(tmp_path)]) == 2
    assert "vllm/config.py of this vLLM cannot be read: " in capsys.readouterr().err


def test_a_source_says_its_version_and_where_names_are_defined(source: VllmSource) -> None:
    """All others are followed in the vLLM that is installed."""
    assert source.version == "0.40.1"
    found = source.find("vllm.sub", "Derived.__init__")
    assert found is not None
    assert found.parameters == "self, a, *, b='x'"
    assert source.find("vllm.sub", "Base.gone") is None


@pytest.fixture(scope="module")
def installed() -> Path:
    """The folder of the vLLM that is installed, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.smoke
def test_a_supported_vllm_is_as_the_plugin_knows_it(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--against", str(installed)]) == 0, capsys.readouterr().out
    assert "DIFFERS" not in capsys.readouterr().out


CHANGES = (
    (
        "v1/executor/abstract.py",
        "def pin_lora(self, lora_id",
        "def pin_lora(self, adapter, lora_id",
    ),
    ("v1/engine/core.py", "def process_input_sockets", "def read_sockets"),
    ("v1/core/sched/scheduler.py", "def _free_request", "def _end_request"),
    ("lora/lora_weights.py", "LoRALayerWeights", "LayerWeights"),
)
GONE = "v1/worker/gpu/lora_utils.py"


@pytest.fixture(scope="module")
def changed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another vLLM: the installed one as links, but for files with the changes above."""
    other = tmp_path_factory.mktemp("changed") / "vllm"
    shutil.copytree(
        installed,
        other,
        copy_function=lambda a, b: Path(b).symlink_to(a),
        ignore=lambda _, names: {n for n in names if not n.endswith(".py") and "." in n},
    )
    for file, old, new in CHANGES:
        text = (other / file).read_text()
        assert old in text
        (other / file).unlink()
        (other / file).write_text(text.replace(old, new))
    (other / GONE).unlink()
    return other


@pytest.fixture(scope="module")
def reported(changed: Path) -> tuple[int, str]:
    """The command's exit status for it, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["doctor", "--against", str(changed)])
    return status, printed.getvalue()


@pytest.mark.parametrize(
    "difference",
    [
        pytest.param("takes (self, adapter, lora_id); expected (self, lora_id)", id="parameter"),
        pytest.param(
            "vllm.v1.engine.core has no EngineCoreProc.process_input_sockets", id="target"
        ),
        pytest.param(
            "vllm.v1.core.sched.scheduler has no Scheduler._free_request",
            id="method-that-is-overridden",
        ),
        pytest.param("vllm.lora.lora_weights has no LoRALayerWeights", id="import"),
        pytest.param("there is no module", id="module"),
    ],
)
def test_what_differs_in_another_vllm_is_reported(
    reported: tuple[int, str], difference: str
) -> None:
    status, printed = reported
    assert status == 1
    assert "DIFFERS" in printed
    assert difference in printed


def test_a_path_without_vllm_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--against", str(tmp_path / "nothing")]) == 2
    assert "/nothing does not exist: expected a wheel" in capsys.readouterr().err
    assert main(["doctor", "--against", str(tmp_path)]) == 2
    assert "contains no vLLM: expected a wheel" in capsys.readouterr().err
