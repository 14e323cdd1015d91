"""What somebody learns of another's prompts and adapters by the time that its own requests take.

Two `vllm serve` side by side with a small random Llama and prefix caching, one with a tenants file
and one without keys. In each trial a coin decides what a victim asks for, and then the attacker
times the first token of one request of its own:

- *prefix*: has the victim sent this prompt, with an adapter that both may use?
- *adapter*: is the victim's own adapter in memory? With tenants the attacker may not use it, and
  times the 404;
- *shared adapter*: the same with an adapter that both may use;
- *eviction*: has the victim had any adapter loaded? The attacker has filled the memory with its own
  before, and sees whether one of these has gone.

Where the coin says no, the victim asks for something else that costs as much, or for the base model
where the question is whether it has loaded anything. Servers take turns within a trial, in random
order, so that what else the machine does meets both alike.

The area under the curve is the probability that of two requests, one after a yes and one after a
no, the attacker tells which is which: 0.5 is guessing, 1 knowing. The interval is that of 95 of 100
bootstrap samples. Servers do nothing else and the attacker knows what to ask for, both in its
favour; one trial is one look, and looks can be repeated.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server

VICTIM, ATTACKER, OPERATOR = "victim", "attacker", "operator"
KEYS = {name: f"sk-{name}-0123456789abcdef" for name in (VICTIM, ATTACKER, OPERATOR)}
BASE, SHARED = "base", "shared"
SLOTS = 2  # and as many adapters in host memory
FILLERS = tuple(f"filler-{number}" for number in range(2 * SLOTS))
OWN = {who: tuple(f"{who}-{number}" for number in range(SLOTS)) for who in (VICTIM, ATTACKER)}
ADAPTERS = (SHARED, *FILLERS, *OWN[VICTIM], *OWN[ATTACKER])
SHORT, LONG = 8, 448
WARM_UP = 2  # pairs of trials of each kind that do not count
BOOTSTRAPS = 1000
ARMS = ("tenants", "no tenants")


@dataclass
class Arm:
    """One server, and those who ask it.

    Attributes:
        clients: By whose they are.
    """

    clients: dict[str, httpx.Client]

    def ask(self, who: str, model: str, prompt: Sequence[int]) -> float:
        """Milliseconds until the answer to a request for one token has come."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
        begun = time.perf_counter()
        response = self.clients[who].post("/v1/completions", json=body)
        taken = 1000 * (time.perf_counter() - begun)
        if response.status_code not in (200, 404):
            raise RuntimeError(f"{who}, {model}: {response.status_code} {response.text}")
        return taken

    def flush(self, prompt: Sequence[int]) -> None:
        """Pushes everybody's adapters out of slots and host memory."""
        for name in FILLERS:
            self.ask(OPERATOR, name, prompt)


class Trials:
    """The questions, each asked once for a coin's yes or no.

    Args:
        numbers: Makes prompts that nobody has sent before.
    """

    def __init__(self, numbers: random.Random) -> None:
        self._numbers = numbers

    def prompt(self, length: int = SHORT) -> list[int]:
        from tests.serving.models.tiny_models import VOCAB_SIZE

        return [self._numbers.randrange(3, VOCAB_SIZE) for _ in range(length)]

    def prefix(self, arm: Arm, is_yes: bool) -> float:
        guessed, other = self.prompt(LONG), self.prompt(LONG)
        arm.ask(ATTACKER, SHARED, self.prompt())  # the adapter is in its slot
        arm.ask(VICTIM, SHARED, guessed if is_yes else other)
        return arm.ask(ATTACKER, SHARED, guessed)

    def adapter(self, arm: Arm, is_yes: bool) -> float:
        return self._resident(arm, OWN[VICTIM][0], OWN[VICTIM][1], is_yes)

    def shared_adapter(self, arm: Arm, is_yes: bool) -> float:
        return self._resident(arm, SHARED, OWN[VICTIM][1], is_yes)

    def _resident(self, arm: Arm, name: str, other: str, is_yes: bool) -> float:
        arm.flush(self.prompt())
        arm.ask(VICTIM, name if is_yes else other, self.prompt())
        return arm.ask(ATTACKER, name, self.prompt())

    def eviction(self, arm: Arm, is_yes: bool) -> float:
        for name in OWN[ATTACKER]:
            arm.ask(ATTACKER, name, self.prompt())
        arm.ask(VICTIM, OWN[VICTIM][0] if is_yes else BASE, self.prompt())
        # Whoever has lost an adapter waits for it: slower is yes.
        return -arm.ask(ATTACKER, OWN[ATTACKER][0], self.prompt())


KINDS = {
    "prefix": Trials.prefix,
    "adapter": Trials.adapter,
    "shared adapter": Trials.shared_adapter,
    "eviction": Trials.eviction,
}


@dataclass(frozen=True)
class Looks:
    """What the attacker has seen, in milliseconds: lower speaks for yes."""

    yes: list[float]
    no: list[float]

    def auc(self) -> float:
        """The probability that a yes is lower than a no; ties count half."""
        return auc(self.yes, self.no)

    def interval(self, numbers: random.Random) -> tuple[float, float]:
        """Bounds that hold 95 of 100 bootstrap samples."""
        found = sorted(
            auc(
                numbers.choices(self.yes, k=len(self.yes)), numbers.choices(self.no, k=len(self.no))
            )
            for _ in range(BOOTSTRAPS)
        )
        return found[int(0.025 * BOOTSTRAPS)], found[int(0.975 * BOOTSTRAPS)]


def auc(yes: Sequence[float], no: Sequence[float]) -> float:
    ordered = sorted(no)
    above = sum(
        len(ordered) - (bisect_left(ordered, each) + bisect_right(ordered, each)) / 2
        for each in yes
    )
    return above / (len(yes) * len(no))


def run(
    arms: dict[str, Arm], trials: int, seconds: float, seed: int
) -> dict[str, dict[str, Looks]]:
    """All trials, or as many as the time allows; what was seen, by kind and arm."""
    numbers = random.Random(seed)
    questions = Trials(numbers)
    seen = {kind: {name: Looks([], []) for name in arms} for kind in KINDS}
    end = time.monotonic() + seconds
    for number in range(-WARM_UP, trials // 2):
        if number > 0 and time.monotonic() > end:
            print(f"{2 * number} trials in {seconds:.0f} s", file=sys.stderr, flush=True)
            break
        for kind, question in KINDS.items():
            for is_yes in numbers.sample([True, False], 2):  # as many of each
                for name in numbers.sample(list(arms), len(arms)):
                    taken = question(questions, arms[name], is_yes)
                    if number >= 0:
                        looks = seen[kind][name]
                        (looks.yes if is_yes else looks.no).append(taken)
    return seen


def figures_of(seen: dict[str, dict[str, Looks]]) -> Iterable[Figure]:
    """What the attacker can tell, by kind and server."""
    numbers = random.Random(0)
    for kind, looks in seen.items():
        for name, each in looks.items():
            low, high = each.interval(numbers)
            yes, no = (abs(statistics.median(times)) for times in (each.yes, each.no))
            case = f"{kind}, {name}"
            yield Figure(case, "trials", [len(each.yes) + len(each.no)])
            yield Figure(case, "AUC", [each.auc()])
            yield Figure(case, "least of 95 of 100", [low])
            yield Figure(case, "most", [high])
            yield Figure(case, "median after yes, ms", [yes])
            yield Figure(case, "after no, ms", [no])


def write_settings(scratch: Path) -> list[str]:
    """The arguments of a server with tenants."""
    from vllm_multilora.tenants.keys import stored

    tenants = {
        who: {"keys": [stored(KEYS[who])], "adapters": [f"{who}-*", SHARED], "base_model": True}
        for who in (VICTIM, ATTACKER)
    }
    (scratch / "tenants.json").write_text(json.dumps({"tenants": tenants}))
    (scratch / "admin-key").write_text(KEYS[OPERATOR])
    return [
        *("--multilora-tenants", str(scratch / "tenants.json")),
        *("--multilora-admin-key-file", str(scratch / "admin-key")),
    ]


def client_of(url: str, who: str, has_keys: bool) -> httpx.Client:
    headers = {"authorization": f"Bearer {KEYS[who]}"} if has_keys else {}
    return httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False)


@benchmark(
    workload="an attacker who times requests of its own, on a server with prefix caching",
    control="a server without tenants beside it, in the same trials",
    figure="the area under the curve (AUC): how well it tells what a victim has asked for",
    compares_to="0.5, which is guessing",
    quick={"trials": 4},
)
def leak(trials: int = 300, seconds: float = 3600.0, seed: int = 0) -> Iterable[Figure]:
    """What somebody learns of another's prompts and adapters by the time that its requests take.

    Args:
        trials: Of each kind, on each server.
        seconds: For all trials, at most; two of each kind are taken in any case.
        seed: Of the coins and prompts.
    """
    from tests.serving.models.recipes import AdapterRecipe
    from tests.serving.models.tiny_adapters import write_adapter
    from tests.serving.models.tiny_models import write_llama

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = write_llama(scratch / "base", positions=1024)
        modules = [
            f"{name}={write_adapter(base, scratch / name, AdapterRecipe(name, rank=16), seed=n)}"
            for n, name in enumerate(ADAPTERS)
        ]
        settings = {"tenants": write_settings(scratch), "no tenants": []}
        arms = {}
        for name in ARMS:
            server = stack.enter_context(
                vllm_server(
                    base,
                    *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager"),
                    *("--max-model-len", "512", "--enable-prefix-caching", "--block-size", "32"),
                    *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS)),
                    *("--max-lora-rank", "16", "--lora-modules", *modules),
                    *settings[name],
                    log=scratch / f"{name}.log",
                    start_timeout=600.0,
                )
            )
            clients = {who: client_of(server.url, who, bool(settings[name])) for who in KEYS}
            for each in clients.values():
                stack.callback(each.close)
            arms[name] = Arm(clients)
        yield from figures_of(run(arms, trials, seconds, seed))
