"""Names of adapters mean nothing to a chat's images and texts; their versions do to encodings."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.serving  # imports vLLM


@pytest.fixture(autouse=True)
def patched() -> None:
    from vllm_multilora.integration.patching.ledger import apply_patches

    apply_patches()


def config(**lora: Any) -> SimpleNamespace:
    """An engine's settings, as far as these functions read them."""
    return SimpleNamespace(lora_config=SimpleNamespace(**lora), additional_config={})


def default_adapter(defaults: dict[str, str] | None, *adapters: str, plugin: bool = True) -> Any:
    """The adapter that vLLM applies to a base model's chat with a text and an image."""
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.lora.request import LoRARequest

    serving: Any = object.__new__(type("Serving", (BaseServing,), {}))
    vllm_config = config(default_mm_loras=defaults)
    vllm_config.additional_config = {"multilora": {"enabled": plugin}}
    serving.models = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=vllm_config),
        lora_requests={
            name: LoRARequest(name, number, f"/{name}") for number, name in enumerate(adapters, 1)
        },
    )
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": ""}}]
    request = SimpleNamespace(model=None, messages=[{"role": "user", "content": parts}])
    found = serving._get_active_default_mm_loras(request)
    return found and found.lora_name


@pytest.mark.smoke("default adapters for images and audio")
def test_an_adapters_name_makes_it_no_default():
    assert default_adapter(None, "text") is None
    assert default_adapter(None, "image") is None
    assert default_adapter({"audio": "/audio"}, "image", "audio") is None


@pytest.mark.smoke("default adapters for images and audio")
def test_the_operators_default_is_one_whatever_others_are_named():
    assert default_adapter({"image": "/image"}, "image") == "image"
    assert default_adapter({"image": "/image"}, "text", "image") == "image"


def test_with_the_plugin_off_vllm_decides():
    assert default_adapter(None, "text", plugin=False) == "text"


@pytest.mark.smoke("reload beside running requests")
def test_encodings_of_two_versions_of_an_adapter_are_two():
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.input_processor import InputProcessor

    processor: Any = object.__new__(InputProcessor)
    processor.lora_config = SimpleNamespace(enable_tower_connector_lora=True)
    processor.vllm_config = config()

    def key(lora: LoRARequest | None) -> str:
        return processor._get_mm_identifier("hash", lora)

    one, two = (key(LoRARequest("acme", number, "/acme")) for number in (1, 2))
    assert len({one, two, key(None)}) == 3
    assert key(None) == "hash"
    processor.lora_config.enable_tower_connector_lora = False
    assert key(LoRARequest("acme", 1, "/acme")) == "hash"
