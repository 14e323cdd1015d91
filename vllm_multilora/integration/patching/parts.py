"""The parts of the plugin, the vLLM versions that each was tested with, and its modules."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_multilora.integration.patching.version import minor_of


@dataclass(frozen=True)
class Part:
    """A part of the plugin, and the oldest and newest minor versions of vLLM it was tested with.

    `modules` are those below `vllm_multilora` that belong to it, packages included.
    """

    name: str
    what: str
    first: tuple[int, int]
    last: tuple[int, int]
    modules: tuple[str, ...] = ()

    @property
    def tested(self) -> str:
        return " to ".join(".".join(map(str, each)) for each in (self.first, self.last))

    def is_tested(self, version: str | None) -> bool:
        """Whether this part was tested with a version of vLLM."""
        minor = minor_of(version)
        return minor is not None and self.first <= minor <= self.last

    def is_newer(self, version: str | None) -> bool:
        """Whether a version of vLLM is newer than those that this part was tested with."""
        minor = minor_of(version)
        return minor is not None and minor > self.last


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
    """The part that a module belongs to: the core, unless a list says otherwise."""
    name = module.removeprefix("vllm_multilora.")
    for part in (GATEWAY, TOOLS):
        if any(name == each or name.startswith(f"{each}.") for each in part.modules):
            return part
    return CORE
