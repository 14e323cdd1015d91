"""Public names that lead to adapters: by share, by a value in the request, with fallbacks."""

from vllm_multilora.routing.request_facts import (
    BadValueError,
    NoCaseError,
    RequestError,
    RequestFacts,
)
from vllm_multilora.routing.route_targets import Blended, Candidate, Turns
from vllm_multilora.routing.routes_file import Routes, load_routes, parse_routes

__all__ = [
    "BadValueError",
    "Blended",
    "Candidate",
    "NoCaseError",
    "RequestError",
    "RequestFacts",
    "Routes",
    "Turns",
    "load_routes",
    "parse_routes",
]
