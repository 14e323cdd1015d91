"""The parts of the plugin, the vLLM versions that each was tested with, and its modules."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_multilora.integration.patching.version import minor_of


@dataclass(frozen=True)
class Part:
    """A part of the plugin.

    Attributes:
        name: Short name, unique.
        what: What it does, in words.
        first: The oldest minor version of vLLM that it was tested with, such as `(0, 29)`.
        last: The newest one.
        modules: Modules and packages below `vllm_multilora` that belong to it.
    """

    name: str
    what: str
    first: tuple[int, int]
    last: tuple[int, int]
    modules: tuple[str, ...] = ()

    @property
    def tested(self) -> str:
        """The tested versions, in words."""
        return " to ".join(".".join(map(str, each)) for each in (self.first, self.last))

    def is_tested(self, version: str | None) -> bool:
        """Whether this part was tested with a version of vLLM."""
        minor = minor_of(version)
        return minor is not None and self.first <= minor <= self.last

    def is_newer(self, version: str | None) -> bool:
        """Whether a version of vLLM is newer than those that this part was tested with."""
        minor = minor_of(version)
        return minor is not None and minor > self.last

    def has_module(self, module: str) -> bool:
        """Whether a module, such as `vllm_multilora.store.clients.client`, belongs to this part."""
        return part_of(module) is self


CORE = Part("core", "LoRA serving", (0, 29), (0, 33))

GATEWAY = Part(
    "gateway",
    "the gateway (HTTP, names, keys, tenants)",
    (0, 29),
    (0, 33),
    modules=(
        "gateway",
        "integration.patching.tables.gateway_seams",
        "integration.server",
        "metering",
        "routing",
        "tenants",
    ),
)

TOOLS = Part(
    "tools",
    "what the commands do without an engine",
    (0, 29),
    (0, 33),
    modules=(
        "cli",
        "integration.engine_config",
        "integration.flag_values",
        "integration.offline",
        "integration.patching.tables.ledger",
        "plugin",
        "toolbox",
    ),
)
"""The commands, and what puts the other two parts together: neither of them imports it."""


def part_of(module: str) -> Part:
    """The part that a module belongs to: the core, unless a list says otherwise.

    Args:
        module: Its full name, such as `vllm_multilora.store.clients.client`.
    """
    name = module.removeprefix("vllm_multilora.")
    for part in (GATEWAY, TOOLS):
        if any(name == each or name.startswith(f"{each}.") for each in part.modules):
            return part
    return CORE
