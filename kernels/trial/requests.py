"""What a trial's process is asked, as JSON: kinds, row counts, kernels by name, cases to skip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module

from multilora_kernels.trial.cases import Backend, Begun, Ended
from multilora_kernels.trial.kinds import LayerKind


@dataclass(frozen=True)
class NamedBackend:
    """Kernels by where their `Prepare` function is.

    Attributes:
        target: As `module:function`.
        reads_rests: As of `Backend`.
    """

    target: str
    reads_rests: bool = False

    def load(self) -> Backend:
        """The kernels.

        Raises:
            ImportError: There is no such module.
            AttributeError: It has no such function.
        """
        module, _, function = self.target.partition(":")
        return Backend(getattr(import_module(module), function), self.reads_rests)


@dataclass(frozen=True)
class TrialRequest:
    """One trial.

    Attributes:
        kinds: Kinds of layers.
        rows: Row counts, ascending.
        backends: Kernels by the names that they are reported under.
        device: PyTorch's name of the device.
        max_tokens: The largest number of rows of the server's steps.
        timing_s: Seconds for timing kernels that are right; 0: they are only checked. GPUs only.
        skip: Cases that are over already, as kind, backend and rows.
    """

    kinds: tuple[LayerKind, ...]
    rows: tuple[int, ...]
    backends: Mapping[str, NamedBackend]
    device: str
    max_tokens: int
    timing_s: float
    skip: frozenset[tuple[int, str, int]] = frozenset()

    def without(self, cases: frozenset[tuple[int, str, int]], timing_s: float) -> TrialRequest:
        """The same trial without more cases, whose timing has taken so many seconds."""
        left = max(self.timing_s - timing_s, 0.0)
        return replace(self, skip=self.skip | cases, timing_s=left)

    def encode(self) -> str:
        """As one line of text."""
        fields = asdict(self)
        fields["kinds"] = [kind.as_json() for kind in self.kinds]
        fields["skip"] = sorted(self.skip)
        return json.dumps(fields)

    @classmethod
    def decode(cls, text: str) -> TrialRequest:
        """The request that `encode` wrote."""
        fields = json.loads(text)
        kinds = tuple(map(LayerKind.from_json, fields.pop("kinds")))
        backends = {name: NamedBackend(**each) for name, each in fields.pop("backends").items()}
        skip = frozenset((kind, name, rows) for kind, name, rows in fields.pop("skip"))
        rows = tuple(fields.pop("rows"))
        return cls(kinds=kinds, rows=rows, backends=backends, skip=skip, **fields)


def encode_event(event: Begun | Ended) -> str:
    """A case's beginning or end as one line of text."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def decode_event(text: str) -> Begun | Ended:
    """The event that `encode_event` wrote."""
    fields = json.loads(text)
    kind: type[Begun | Ended] = {"Begun": Begun, "Ended": Ended}[fields.pop("event")]
    return kind(**fields)
