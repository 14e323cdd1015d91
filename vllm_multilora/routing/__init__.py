"""Public names that lead to adapters: by share, by a value in the request, with fallbacks."""

from vllm_multilora.routing.errors import NoCaseError, RoutesFileError
from vllm_multilora.routing.facts import RequestFacts
from vllm_multilora.routing.parsing import Routes, parse_routes
from vllm_multilora.routing.routes_file import RoutesFile, load_routes
from vllm_multilora.routing.targets import Turns

__all__ = [
    "NoCaseError",
    "RequestFacts",
    "Routes",
    "RoutesFile",
    "RoutesFileError",
    "Turns",
    "load_routes",
    "parse_routes",
]
