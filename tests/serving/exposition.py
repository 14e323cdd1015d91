"""The LoRA metrics that a server exposes, read by prometheus_client's own parser."""

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from .server import VllmServer

STOCK = "vllm:lora_requests_info"


def scrape(server: VllmServer) -> str:
    """The text of `/metrics`."""
    response = server.get("/metrics")
    assert response.status_code == 200
    return response.text


def lora_samples(text: str) -> list[Sample]:
    """The samples of the plugin's metrics."""
    return [
        sample
        for family in text_string_to_metric_families(text)
        if family.name.startswith("vllm:lora_") and family.name != STOCK
        for sample in family.samples
    ]


def values(text: str, name: str, *labels: str) -> dict[tuple[str, ...] | str, float]:
    """The values of one sample name by the values of these labels; others are added up."""
    found: dict[tuple[str, ...] | str, float] = {}
    for sample in lora_samples(text):
        if sample.name == name:
            key = tuple(sample.labels.get(label, "") for label in labels)
            found[key] = found.get(key, 0.0) + sample.value
    return {key[0] if len(key) == 1 else key: value for key, value in found.items()}


def lines_of_lora_metrics(text: str) -> str:
    """The plugin's part of `/metrics`, as it is."""
    return "\n".join(
        line
        for line in text.splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("vllm:lora_")
        and STOCK not in line
    )
