"""State that the plugin attaches to vLLM's objects, each item under a typed name.

An executor, an engine core or an API server lives as long as what belongs to it, but vLLM has no
place for a plugin's state. Everything that is kept with such an object is in one attribute of it, a
mapping by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from vllm.lora.request import LoRARequest

    from vllm_multilora.failures import LoadFailure
    from vllm_multilora.integration.engine.adapters import EngineAdapters
    from vllm_multilora.integration.engine.invocation import Activation
    from vllm_multilora.integration.engine.reaching import RemoteMachine
    from vllm_multilora.integration.fill_link import FillLink
    from vllm_multilora.integration.server.access import Access
    from vllm_multilora.integration.server.adapter_directory import DirectoryServer
    from vllm_multilora.integration.server.metering import Prompt, ServerMeter
    from vllm_multilora.integration.server.refusals import Refusals
    from vllm_multilora.integration.server.routes import ServerRoutes
    from vllm_multilora.integration.server.shared_names import SharedNames
    from vllm_multilora.integration.server.status_route import RecentListing
    from vllm_multilora.integration.server.versions import Version
    from vllm_multilora.metering.usage import Usage
    from vllm_multilora.store.client import StoreClient
    from vllm_multilora.tenants.on_request import RequestTenant

_T = TypeVar("_T")


class Attached(Generic[_T]):
    """One thing that an object of vLLM's may have with it.

    Args:
        name: Short name, unique.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def get(self, owner: Any) -> _T | None:
        """What the object has; None if nothing was set."""
        value: _T | None = getattr(owner, "vllm_multilora", {}).get(self._name)
        return value

    def set(self, owner: Any, value: _T) -> None:
        """Keeps something with the object, in the place of what it had before."""
        if not hasattr(owner, "vllm_multilora"):
            owner.vllm_multilora = {}
        owner.vllm_multilora[self._name] = value

    def get_or_make(self, owner: Any, make: Callable[[], _T]) -> _T:
        """What the object has; what `make` returns, from then on, where nothing was set."""
        if not self.is_set(owner):
            self.set(owner, make())
        value: _T = owner.vllm_multilora[self._name]
        return value

    def is_set(self, owner: Any) -> bool:
        """Whether anything was set, None included."""
        return self._name in getattr(owner, "vllm_multilora", {})


LINK: Attached[FillLink | None] = Attached("link")
"""Of an executor: the link on which its workers answer; None where they cannot."""

SERVER: Attached[str] = Attached("server")
"""Of an executor: what its server was called when its workers started."""

EARLY_STORE: Attached[StoreClient | None] = Attached("early-store")
"""Of an executor: keeps this machine's store up until its engine core has connected to it."""

REACHED: Attached[list[RemoteMachine]] = Attached("reached")
"""Of an executor: the other machines that its workers are on, where they can be heard."""

ADAPTERS: Attached[EngineAdapters | None] = Attached("adapters")
"""Of an engine core: its adapters; None where stock vLLM runs."""

ROW_SQUARES: Attached[torch.Tensor] = Attached("row-squares")
"""Of a linear layer whose weights vLLM has repacked: the squared lengths of their rows."""

ROUTES: Attached[ServerRoutes] = Attached("routes")
"""Of an API server's `OpenAIServingModels`: its routes."""

NAMES: Attached[SharedNames] = Attached("names")
"""Of an API server's `OpenAIServingModels`: what shares its names with other API servers."""

DIRECTORY: Attached[DirectoryServer] = Attached("directory")
"""Of an API server's `OpenAIServingModels`: what serves its adapter directories."""

REFUSALS: Attached[Refusals] = Attached("refusals")
"""Of an API server's `OpenAIServingModels`: what vLLM's resolvers have found and the engine not."""

ACCESS: Attached[Access] = Attached("access")
"""Of an API server's application: its keys and tenants; not set where it has neither."""

LISTING: Attached[RecentListing] = Attached("listing")
"""Of an API server's `OpenAIServingModels`: what was last told of all adapters."""

ON_FAILURE: Attached[Callable[[LoRARequest, LoadFailure], None] | None] = Attached("on-failure")
"""Of an `OutputProcessor`: is told of every request with an adapter that has failed."""

ON_OUTPUTS: Attached[Callable[[Iterable[Any], dict[str, Any]], None]] = Attached("on-outputs")
"""Of an `OutputProcessor`: gets each step's outputs before vLLM does, and all requests' states."""

SEE_OFF: Attached[Callable[[LoRARequest], None]] = Attached("see-off")
"""Of an `OutputProcessor`: is told of the adapter of every request that goes to the engine, and
raises if it is not to go there."""

TENANT: Attached[RequestTenant] = Attached("tenant")
"""Of an engine core's `Request`: its tenant; see `tenant_of_request`."""

GRAMMAR_TIME: Attached[float] = Attached("grammar-time")
"""Of a grammar of vLLM's: seconds that it may take for its next token; see `engine.grammars`."""

SLOW_GRAMMARS: Attached[list[Any]] = Attached("slow-grammars")
"""Of a `StructuredOutputManager`: grammars that have taken too long, and were not looked at yet;
not set where nobody looks."""

STUCK_GRAMMARS: Attached[list[Any]] = Attached("stuck-grammars")
"""Of the same: grammars that have allowed no token, and whose requests have got none since."""

CHECKED: Attached[bool] = Attached("checked")
"""Of a request's `StructuredOutputsParams`: set once they have been checked before vLLM would."""

HIDDEN_FOLDERS: Attached[tuple[str, ...]] = Attached("hidden-folders")
"""Of an API server's `RequestState`: folders that its client is not told."""

HASHER: Attached[Callable[[Any], list[Any]] | None] = Attached("hasher")
"""Of a `Request` with an adapter: what hashes its blocks; None where nothing is cached."""

VERSION: Attached[str] = Attached("version")
"""Of a `Request`: the digest of the weights that it runs on; not set before they are known."""

ACTIVATION: Attached[Activation] = Attached("activation")
"""Of a `Request` with an activated adapter: where that begins to act, in which version."""

VERSIONS: Attached[dict[int, Version]] = Attached("versions")
"""Of an API server's engine client: the version of each registered adapter, by its number."""

LISTS: Attached[Callable[[int, Any], None] | None] = Attached("lists")
"""Of a `PrometheusStatLogger`: takes the lists of adapters in an engine's statistics; None: vLLM's
own metric does, as it is."""

METER: Attached[ServerMeter] = Attached("meter")
"""Of an API server's `OutputProcessor`: what follows its requests to their ends."""

ENDED: Attached[Usage] = Attached("ended")
"""Of a `RequestState` that has ended: what its prompt has used so far."""

UNREAD_SCORES: Attached[int] = Attached("unread-scores")
"""Of what collects a stream's outputs: log probabilities that its client has not been told yet."""

PROMPT: Attached[Prompt | None] = Attached("prompt")
"""Of a `RequestState`, or of the `ParentRequest` of several: what its prompt has used so far; None
once it has ended."""
