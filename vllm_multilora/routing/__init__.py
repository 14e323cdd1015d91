"""Public names that lead to adapters: by share, by a value in the request, with fallbacks."""

from vllm_multilora.routing.errors import BadValueError, NoCaseError, RequestError
from vllm_multilora.routing.facts import RequestFacts
from vllm_multilora.routing.parsing import Routes, load_routes, parse_routes
from vllm_multilora.routing.targets import Blended, Candidate, Turns

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
