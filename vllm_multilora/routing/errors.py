"""What can be wrong with a routes file, and with a request for a route."""

from __future__ import annotations

from vllm_multilora.errors import ConfigError, MultiLoRAError


class RoutesFileError(ConfigError):
    """A routes file cannot be used; says where, what was found and what was expected."""


class NoCaseError(MultiLoRAError):
    """A request's value has no case in its route, and the route no default."""
