"""Which kernels the settings mean on which device, and what a new engine is told of them."""

from types import SimpleNamespace

import pytest

from multilora_kernels import TritonUnavailableError, native, triton_availability
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching import activation
from vllm_multilora.integration.patching.activation import choose_backend


@pytest.fixture(autouse=True)
def _everything_available(monkeypatch):
    """A machine with a C compiler, and with Triton in the mode that the device needs."""
    monkeypatch.setattr(native, "is_available", lambda: True)
    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setattr(triton_availability, "is_installed", lambda: True)
    monkeypatch.setattr(triton_availability, "require", lambda device_type: None)


@pytest.mark.parametrize(
    ("backend", "device", "plain", "invariant"),
    [
        ("auto", "cpu", "native", "native"),
        ("native", "cpu", "native", "native"),
        ("torch", "cpu", "torch", None),
        ("triton", "cpu", "triton", "triton-invariant"),
        ("vllm", "cpu", "vllm", None),
        ("auto", "cuda", "triton", "triton-invariant"),
        ("triton", "cuda", "triton", "triton-invariant"),
        ("torch", "cuda", "torch", None),
        ("vllm", "cuda", "vllm", None),
        ("auto", "xpu", "vllm", None),
        ("vllm", "xpu", "vllm", None),
    ],
)
def test_backend_of_settings_and_device(backend, device, plain, invariant):
    assert choose_backend(MultiLoRAConfig(backend=backend), device) == plain
    if invariant is not None:
        settings = MultiLoRAConfig(backend=backend, batch_invariant=True)
        assert choose_backend(settings, device) == invariant
        settings = MultiLoRAConfig(backend=backend)
        assert choose_backend(settings, device, vllm_batch_invariant=True) == invariant


@pytest.mark.parametrize(
    ("backend", "device", "is_right"),
    [("auto", "cuda", True), ("triton", "cpu", True), ("auto", "cpu", False)],
)
def test_vllms_kernels_are_for_gpus(backend, device, is_right):
    settings = MultiLoRAConfig(backend=backend, kernels="vllm")
    if is_right:
        assert choose_backend(settings, device) == "triton"
        return
    with pytest.raises(ConfigError, match=r"-kernels vllm is for GPUs .* here is 'native'"):
        choose_backend(settings, device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_vllms_kernels_see_to_its_batch_invariance_themselves(device):
    settings = MultiLoRAConfig(backend="vllm")
    assert choose_backend(settings, device, vllm_batch_invariant=True) == "vllm"


def test_without_a_compiler_batch_invariance_is_refused_and_says_who_asked(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert choose_backend(MultiLoRAConfig(), "cpu") == "torch"
    with pytest.raises(ConfigError, match=r"^--multilora-batch-invariant needs .* 'torch'"):
        choose_backend(MultiLoRAConfig(batch_invariant=True), "cpu")
    with pytest.raises(ConfigError, match=r"^VLLM_BATCH_INVARIANT=1 needs .*-backend native"):
        choose_backend(MultiLoRAConfig(), "cpu", vllm_batch_invariant=True)
    with pytest.raises(ConfigError, match=r"^VLLM_BATCH_INVARIANT=1 needs .* 'torch'"):
        choose_backend(MultiLoRAConfig(backend="torch"), "cpu", vllm_batch_invariant=True)


def test_on_a_gpu_without_triton_vllm_computes(monkeypatch):
    def refuse(device_type):
        raise TritonUnavailableError("pip install triton")

    monkeypatch.setattr(triton_availability, "is_installed", lambda: False)
    monkeypatch.setattr(triton_availability, "require", refuse)
    assert choose_backend(MultiLoRAConfig(), "cuda") == "vllm"
    assert choose_backend(MultiLoRAConfig(), "cuda", vllm_batch_invariant=True) == "vllm"
    for settings in (MultiLoRAConfig(backend="triton"), MultiLoRAConfig(batch_invariant=True)):
        with pytest.raises(TritonUnavailableError, match="pip install triton"):
            choose_backend(settings, "cuda")


def test_backends_of_another_device_are_refused():
    with pytest.raises(ValueError, match="native backend runs on CPU tensors only, not on cuda"):
        choose_backend(MultiLoRAConfig(backend="native"), "cuda")
    for settings in (MultiLoRAConfig(backend="triton"), MultiLoRAConfig(batch_invariant=True)):
        with pytest.raises(ConfigError, match=r"kernels for CPUs and .* here is 'xpu'"):
            choose_backend(settings, "xpu")


def test_torch_on_a_gpu_needs_eager_mode():
    settings = MultiLoRAConfig(backend="torch")
    with pytest.raises(ConfigError, match=r"CUDA graphs cannot capture: .* --enforce-eager"):
        choose_backend(settings, "cuda", captures_graphs=True)
    assert choose_backend(settings, "cuda") == "torch"
    assert choose_backend(settings, "cpu") == "torch"
    with pytest.raises(ConfigError, match=r"VLLM_BATCH_INVARIANT=1 .* choose .* triton$"):
        choose_backend(settings, "cuda", vllm_batch_invariant=True)


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"backend": "torch", "dora": False}, ["--multilora-backend, --no-multilora-dora"]),
        ({"enabled": False}, []),
        ({}, []),
    ],
)
def test_settings_without_effect_when_lora_is_off_are_reported(given, reported, monkeypatch):
    warnings = []
    monkeypatch.setattr(activation.logger, "warning", lambda *args: warnings.extend(args[1:]))
    additional = {"multilora": given}
    activation.announce(SimpleNamespace(lora_config=None, additional_config=additional))
    assert warnings == reported


def test_settings_without_effect_with_vllms_kernels_are_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(activation.logger, "warning", lambda *args: warnings.extend(args[1:]))
    monkeypatch.setattr(activation, "kernel_backend", lambda config: "vllm")
    heeded = {"enabled": True, "backend": "vllm", "routes": "routes.yaml"}
    idle = {"usage_log": "usage.jsonl", "adapter_dir": ["/adapters"]}
    for given in ({}, heeded, {**heeded, **idle}):
        config = SimpleNamespace(lora_config=object(), additional_config={"multilora": given})
        activation.announce(config)
    assert warnings == ["--multilora-usage-log, --multilora-adapter-dir"]
