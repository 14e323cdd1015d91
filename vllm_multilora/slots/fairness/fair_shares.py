"""The order in which flows get tokens, by what each has had so far.

A flow is whoever shares the engine with others: a tenant, or an adapter where nobody names one.
Each has a counter of the service that it has had, divided by its weight, and the one with the least
is served first: the virtual token counter of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024). A token of a prompt costs 1 and a generated one `GENERATED_COST`; a step with
an adapter costs those that use it what reading its weights does (`reading_cost`).

- **No credit for what nobody asked for.** A flow that comes (back) is lifted to the least counter
  of those that are being served, and one whose requests all run to the least of those that have
  requests waiting; where none waits, nobody owes anything. Counters above it are kept, so that
  nobody gets rid of one by leaving.
- **Work-conserving.** Only an order is decided here: a flow that is alone, or beside others that
  have nothing to compute, is held back by nothing.
- **Bounded.** Two flows that both have requests waiting differ by no more than one of them can be
  given between two decisions: the requests that a batch takes in at once.

Some flows are *heavy*: in the last steps (`HALF_LIFE_STEPS`) they have had more than
`HEAVY_RATIO` times what another has had that is being served, and since then more than
`MIN_HEAVY_RATIO` times. The scheduler bounds what these add to a step (`StepBound`), so that the
others' tokens do not wait for all of theirs.

A step costs a few operations for each flow that has requests, and next to nothing while only one
has any.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass

PROMPT_COST = 1.0
GENERATED_COST = 2.0
"""Cost of a generated token, a computed token of a prompt having 1; as in the paper."""

CONTEXT_TOKENS = 512
"""Length of the context that a generated token is taken to read."""

HEAVY_RATIO, MIN_HEAVY_RATIO = 3.0, 1.25
"""To others' service: above the first a flow gets heavy, and it is so until below the second."""

HALF_LIFE_STEPS = 64
HELD_STEPS = 8
"""Steps after which a request that could not run is worth another look, in a step that has room."""

MAX_REMEMBERED = 4096
"""Flows without requests of which the counters are kept."""

Flow = Hashable

_GROWTH = 2.0 ** (1 / HALF_LIFE_STEPS)
_MAX_SCALE = 1e100


@dataclass(slots=True)
class _Account:
    """What a flow has had.

    Attributes:
        weight: Its share in proportion to the others'.
        served: Cost of all that was computed for it, by weight.
        recent: The same of late: what came earlier counts less, in units that grow with time.
        requests: That have not ended.
        charged_in: The latest step in which something was computed for it.
        held_in: The latest step in which a request of it was not ready to run.
        waits_for_slot: Whether it was ready but for a slot then.
        is_heavy: Whether it has had much more of late than another.
    """

    weight: float
    served: float
    recent: float = 0.0
    requests: int = 0
    charged_in: int = -1
    held_in: int = -1
    waits_for_slot: bool = False
    is_heavy: bool = False


class FairShares:
    """Counters of service by flow; pure bookkeeping over flows and steps.

    Attributes:
        heavy_weight: Of the flows that are heavy in this step, all together.
    """

    def __init__(self) -> None:
        self.heavy_weight = 0.0
        self._step = 0
        self._scale = 1.0  # of `recent`: grows, instead of everybody's falling
        self._working: dict[Flow, _Account] = {}
        self._idle: dict[Flow, _Account] = {}  # those that left last are last
        self._floor = 0.0

    @property
    def is_contended(self) -> bool:
        """Whether more than one flow has requests."""
        return len(self._working) > 1

    # Requests come and go

    def join(self, flow: Flow, weight: float = 1.0) -> None:
        """A request of a flow arrived, with its newest weight; `ValueError`: it is not above 0."""
        if not weight > 0:
            raise ValueError(f"the weight of {flow!r} must be above 0, got {weight!r}")
        account = self._working.get(flow)
        if account is None:
            if len(self._working) == 1:
                (alone,) = self._working.values()
                self._floor = max(self._floor, alone.served)
            account = self._idle.pop(flow, None) or _Account(weight, self._floor)
            account.served = max(account.served, self._floor)
            self._working[flow] = account
        account.weight = weight
        account.requests += 1
        self.unhold(flow)

    def leave(self, flow: Flow) -> None:
        """A request of a flow has ended, however it did."""
        account = self._working[flow]
        account.requests -= 1
        if account.requests:
            return
        del self._working[flow]
        self._idle[flow] = account
        if len(self._idle) > MAX_REMEMBERED:
            # What is not above the floor would be lifted to it anyway.
            kept = [(p, a) for p, a in self._idle.items() if a.served > self._floor]
            self._idle = dict(kept[-MAX_REMEMBERED // 2 :])

    # Steps

    def begin_step(self, waiting: Container[Flow]) -> None:
        """A step is scheduled while `is_contended`; those `waiting` have more requests than run."""
        self._next_step()
        self.heavy_weight = 0.0
        served = []
        for account in self._working.values():
            if self._is_held(account):
                account.is_heavy = False
            else:
                served.append(account)
        if not served:
            return
        self._lift_satisfied(waiting)
        self._floor = max(self._floor, min(account.served for account in served))
        least = min(account.recent for account in served)
        for account in served:
            ratio = MIN_HEAVY_RATIO if account.is_heavy else HEAVY_RATIO
            account.is_heavy = account.recent > ratio * least
            if account.is_heavy:
                self.heavy_weight += account.weight
        if len(served) < len(self._working):
            for account in self._working.values():
                # One whose adapter is being loaded, say, is idle for the others.
                if self._is_held(account) and not account.waits_for_slot:
                    account.served = max(account.served, self._floor)

    def _lift_satisfied(self, waiting: Container[Flow]) -> None:
        """Takes their credit from those that have all that they ask for."""
        wanting: list[_Account] = []
        satisfied: list[_Account] = []
        for flow, account in self._working.items():
            is_held = self._is_held(account)
            if is_held and not account.waits_for_slot:
                continue  # it is idle for the others, whatever it has waiting
            (wanting if is_held or flow in waiting else satisfied).append(account)
        if wanting:
            level = min(account.served for account in wanting)
        else:
            level = max(account.served for account in satisfied)
        for account in satisfied:
            account.served = max(account.served, level)

    def step_alone(self, tokens: int) -> None:
        """A step was scheduled, with so many tokens, while no more than one flow had requests.

        Nobody has had less than a flow that is alone, so what it has is no debt to those who come;
        but it may be heavy beside them.
        """
        self._next_step()
        self.heavy_weight = 0.0
        for account in self._working.values():
            account.is_heavy = False
            account.recent += tokens * PROMPT_COST / account.weight * self._scale

    def hold(self, flow: Flow, *, waits_for_slot: bool = False) -> None:
        """A request of a flow cannot run in this step, whatever the others do.

        If nothing is computed for the flow either, it is nobody that others have to spare, for
        `HELD_STEPS` steps, or until `unhold` or another request of it comes. If it lacks nothing
        but a slot, it keeps its counter, as it waits because of the others; else it is lifted as
        if it had come just now.
        """
        account = self._working[flow]
        account.held_in = self._step
        account.waits_for_slot = waits_for_slot

    def unhold(self, flow: Flow) -> None:
        """A request of a flow that could not run may be ready now."""
        self._working[flow].held_in = -1

    def charge(self, flow: Flow, cost: float) -> None:
        """Something is computed for a flow in this step; to one that has left it is no matter."""
        account = self._working.get(flow)
        if account is not None:
            worth = cost / account.weight
            account.served += worth
            account.recent += worth * self._scale
            account.charged_in = self._step

    # What follows from it

    def served(self, flow: Flow) -> float:
        """What a flow has had, by its weight: the least goes first."""
        account = self._working.get(flow)
        return self._floor if account is None else account.served

    def ranks(self) -> dict[Flow, tuple[float, float]]:
        """What each flow with requests has had by its weight, and, among equals, of late."""
        return {flow: (each.served, each.recent) for flow, each in self._working.items()}

    def worth(self, flow: Flow, cost: float) -> float:
        """By how much a cost would raise what a flow with requests has had."""
        return cost / self._working[flow].weight

    def is_heavy(self, flow: Flow) -> bool:
        """Whether a flow with requests has had much more of late than another."""
        return self._working[flow].is_heavy

    def _is_held(self, account: _Account) -> bool:
        since = self._step - account.held_in
        return account.held_in > account.charged_in and since <= HELD_STEPS

    def _next_step(self) -> None:
        self._step += 1
        self._scale *= _GROWTH
        if self._scale > _MAX_SCALE:
            for account in (*self._working.values(), *self._idle.values()):
                account.recent /= self._scale
            self._scale = 1.0


def cost_of(prompt_tokens: int, begin: int, end: int) -> float:
    """The cost of computing a request's tokens in [begin, end): its prompt's and generated ones."""
    of_prompt = max(0, min(end, prompt_tokens) - begin)
    return PROMPT_COST * of_prompt + GENERATED_COST * max(0, end - begin - of_prompt)


def reading_cost(adapter_bytes: float, token_bytes: float) -> float:
    """The cost of reading an adapter in a step, once for all of its requests there.

    Beside the base model, which is read for all, a generated token reads its context: a byte of an
    adapter costs as much as one of that.
    """
    return GENERATED_COST * adapter_bytes / (CONTEXT_TOKENS * token_bytes) if token_bytes else 0.0
