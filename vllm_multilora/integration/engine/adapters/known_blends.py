"""Which blends an engine core knows: few at a time, since clients can request any number of them.

A blend is made when a request asks for it, and made again if it has left memory. So one that nobody
uses can be forgotten as soon as there are too many.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration.engine.adapters.registrations import Registrations

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class KnownBlends:
    """The blends among the known adapters.

    Args:
        registrations: The known adapters.
        most: Blends that each tenant, and all requests of no tenant together, may have.
    """

    def __init__(self, registrations: Registrations, most: int) -> None:
        self._registrations = registrations
        self._most = most

    def admit(self, request: LoRARequest, tenant: str) -> LoadFailure | None:
        """A request's adapter is about to be known; idle blends are forgotten for it.

        Args:
            request: Its adapter, which need not be a blend.
            tenant: Whose request it is; empty: nobody's in particular.

        Returns:
            Why it may not be: as many others of the tenant are in use.
        """
        known = self._registrations.known
        if not is_blend(request.lora_path) or known.find(request.lora_int_id) is not None:
            return None
        if not self._most:
            refusal = "blends are switched off here (--multilora-max-blends 0)"
            return LoadFailure(FailureKind.INVALID, refusal)
        blends = known.blends()
        own = [entry for entry in blends if entry.blend_owner == tenant]
        if len(own) < self._most:
            return None
        for entry in own:  # those longest not asked for first
            if not entry.is_wanted and not entry.registrations:
                self._registrations.withdraw(entry)
                return None
        counts = Counter(entry.blend_owner for entry in blends)
        for entry in own:  # nobody keeps another tenant from its own by using them
            for other in sorted(entry.owners):
                if counts[other] < self._most:
                    entry.blend_owner = other
                    return None
        return RequestFailure(
            FailureKind.NO_MEMORY,
            f"the limit of blends in use at a time ({self._most}, --multilora-max-blends) is "
            "reached; try again later",
        )
