"""Times a server's steps and loads through its HTTP routes, and makes a calibration of them.

What is in each step is known, because nothing else asks the server: requests that were sent
together generate together, so the time from token to token is that of a step with all of them; and
a lone request's time to its first token is that of a step with its prompt, and its way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from vllm_multilora.capacity.calibration import CalibrationError, Loads, Ranges
from vllm_multilora.capacity.step_cost import Batch, Sample, line, pairs_of
from vllm_multilora.operations.completions import Answer, Ask
from vllm_multilora.slots.budget import MIB

IDLE_LOADS, BESIDE_LOADS, COPIES = 8, 6, 6
"""The most that are timed of each."""

_SHORT_PROMPT, _STREAMS = 16, 4
_DECODED, _REPEATS = 24, 5
_PROMPTS = (8, 32, 128, 512, 2048)
_BESIDE = (32, 128)


class Client(Protocol):
    """Asks the server; `operations.completions.Completions` does."""

    def together(self, asks: Sequence[Ask]) -> list[Answer]: ...

    def beside(
        self, asks: Sequence[Ask], late: Sequence[Ask]
    ) -> tuple[list[Answer], list[Answer]]: ...


@dataclass(frozen=True)
class Adapter:
    """An adapter as the server lists it.

    Attributes:
        name: Its name.
        state: One of `states.AdapterState`, as text.
        bytes: In host memory; 0 if it is not there.
    """

    name: str
    state: str
    bytes: int


@dataclass(frozen=True)
class Limits:
    """Of the server; as in `calibration.Settings`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass
class Measured:
    """What was measured.

    Attributes:
        samples: Steps.
        loads: What loads take; None if none was timed.
        sizes: Bytes by adapter, of those that were loaded.
        largest_load: Bytes.
    """

    samples: list[Sample]
    loads: Loads | None
    sizes: dict[str, int]
    largest_load: int = 0

    @property
    def ranges(self) -> Ranges:
        """The most of everything."""
        batches = [sample.batch for sample in self.samples]
        return Ranges(
            prompt_tokens=max(batch.prompt_tokens for batch in batches),
            rows=max(batch.rows for batch in batches),
            prompt_pairs=max(batch.prompt_pairs for batch in batches),
            context_tokens=max(batch.context_tokens for batch in batches),
            adapter_bytes=max(batch.adapter_bytes for batch in batches),
            load_bytes=self.largest_load,
        )


class Measuring:
    """One run of all measurements.

    Args:
        client: Asks the server, which nobody else asks meanwhile.
        model: The base model's name.
        limits: Of the server.
        list_adapters: The server's adapters now.
        source: Where the files of cold adapters lie, as `Loads.source`.
        progress: Is told what is measured.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        limits: Limits,
        list_adapters: Callable[[], Sequence[Adapter]],
        source: str,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._client = client
        self._model = model
        self._limits = limits
        self._list = list_adapters
        self._source = source
        self._progress = progress
        self._measured = Measured([], None, {})

    def run(self) -> Measured:
        """Measures; a minute or two where a step takes 0.1 seconds.

        Raises:
            CalibrationError: The server takes too short requests.
            UnreachableError: It does not answer.
        """
        if self._limits.max_model_len < 4 * _SHORT_PROMPT + _DECODED:
            raise CalibrationError(
                f"the server takes {self._limits.max_model_len} tokens a request, and at least "
                f"{4 * _SHORT_PROMPT + _DECODED} are needed"
            )
        self._alone(self._model, _SHORT_PROMPT, times=3)
        self._loads()
        in_slots = self._in_slots()
        self._prompts([self._model, *dict.fromkeys((*in_slots[:1], *in_slots[-1:]))])
        self._generation(in_slots)
        self._mixed(in_slots)
        return self._measured

    # Loads

    def _loads(self) -> None:
        cold = [adapter.name for adapter in self._list() if adapter.state == "absent"]
        if not cold:
            return
        beside = (cold[2::3] or cold[1:2])[:BESIDE_LOADS]
        idle = [name for name in cold if name not in beside][:IDLE_LOADS]
        self._progress(f"loads of {len(idle)} adapters from {self._source}")
        extra = [(name, self._first_beyond(name)) for name in idle]
        late = [(name, self._beside(name)) for name in beside]
        # Those that lost their slots to the others.
        copied = [adapter.name for adapter in self._list() if adapter.state == "host"][:COPIES]
        copies = [(name, self._first_beyond(name)) for name in copied]
        self._measured.sizes = {a.name: a.bytes for a in self._list() if a.bytes}
        sizes = self._measured.sizes
        copy_fixed, copy_slope = (
            line([(sizes[n] / MIB, s) for n, s in copies if n in sizes]) if copies else (0.0, 0.0)
        )

        def load(name: str, seconds: float) -> float:
            return max(0.0, seconds - copy_fixed - copy_slope * sizes[name] / MIB)

        found = [(sizes[name] / MIB, load(name, s)) for name, s in extra if name in sizes]
        if not found:
            return
        fixed, slope = line(found)
        self._measured.largest_load = max(sizes.get(name, 0) for name in (*idle, *beside))
        expected = sum(fixed + slope * sizes[name] / MIB for name, _ in late if name in sizes)
        took = sum(seconds for name, seconds in late if name in sizes)
        self._measured.loads = Loads(
            fixed_s=fixed,
            s_per_mib=slope,
            slowdown=max(1.0, took / expected) if expected else 1.0,
            copy_fixed_s=copy_fixed,
            copy_s_per_mib=copy_slope,
            source=self._source,
            measured=len(found) + len(late),
        )

    def _first_beyond(self, name: str) -> float:
        """Seconds by which an adapter's first request is later answered than the next ones."""
        first, *warm = self._alone(name, _SHORT_PROMPT, times=4)
        return max(0.0, first - statistics.median(warm))

    def _beside(self, name: str) -> float:
        """Seconds of a load while others generate.

        The first request for it waits for the end of a step, on average half of one, and for a step
        in which it is copied, beyond what the later ones wait for.
        """
        streams, (cold, *warm) = self._client.beside(
            [Ask(self._model, _SHORT_PROMPT, self._longest)] * min(_STREAMS, self._seqs - 1),
            [Ask(name, _SHORT_PROMPT, 1)] * 4,
        )
        self._client.together([Ask(self._model, _SHORT_PROMPT, 1)])  # until the streams have ended
        later = statistics.mean(answer.first_token_s for answer in warm)
        gaps = _steps(streams)
        step = statistics.median(end - begin for begin, end in gaps)
        loading = [
            end - begin
            for begin, end in gaps
            if begin >= cold.begin_s and end < cold.tokens_s[0] - step
        ]
        batch = Batch(
            rows=len(streams), context_tokens=len(streams) * _SHORT_PROMPT, is_loading=True
        )
        self._measured.samples += [Sample("beside loads", batch, s) for s in loading]
        return max(0.0, cold.first_token_s - later - 1.5 * step)

    # Steps

    def _in_slots(self) -> list[str]:
        """The loaded adapters that can be asked for without a load; the smallest first."""
        listed = self._list()
        slots = [adapter.name for adapter in listed if adapter.state == "slot"]
        self._measured.sizes |= {a.name: a.bytes for a in listed if a.bytes}
        known = [name for name in slots if name in self._measured.sizes]
        return sorted(known, key=self._measured.sizes.__getitem__)

    def _prompts(self, models: Sequence[str]) -> None:
        most = min(self._limits.max_num_batched_tokens, self._limits.max_model_len - 1)
        lengths = sorted({*(p for p in _PROMPTS if p < most), most})
        for model in models:
            self._progress(f"prompts for {model}")
            size = self._size(model)
            for length in lengths:
                batch = Batch(
                    prompt_tokens=length,
                    rows=1,
                    prompt_pairs=pairs_of(length),
                    adapter_bytes=size,
                    adapted_tokens=length if size else 0,
                    adapted_token_bytes=length * size,
                )
                self._measured.samples += [
                    Sample(f"prompt of {length} for {model}", batch, seconds, has_request=True)
                    for seconds in self._alone(model, length, times=_REPEATS)
                ]

    def _generation(self, in_slots: Sequence[str]) -> None:
        for rows in sorted({1, min(4, self._seqs), -(-self._seqs // 2), self._seqs}):
            self._progress(f"generation for {rows} requests")
            mixes = [[self._model], in_slots[:1], in_slots[-1:]]
            if rows > 1 and len(in_slots) > 2:
                mixes.append(list(in_slots))
            for models in mixes:
                if models:
                    self._generate(rows, models, _SHORT_PROMPT)
        long = self._limits.max_model_len - _DECODED - 1
        self._generate(min(4, self._seqs), [self._model], long)

    def _generate(self, rows: int, models: Sequence[str], prompt: int) -> None:
        chosen = [models[n % len(models)] for n in range(rows)]
        answers = self._client.together([Ask(model, prompt, _DECODED + 1) for model in chosen])
        sizes = [self._size(model) for model in chosen]
        adapters = dict(zip(chosen, sizes, strict=True))
        name = models[0] if len(models) == 1 else f"{len(adapters)} adapters"
        for age, (begin, end) in enumerate(_steps(answers), 1):
            batch = Batch(
                rows=rows,
                context_tokens=rows * (prompt + age),
                adapter_bytes=sum(adapters.values()),
                adapted_tokens=sum(size > 0 for size in sizes),
                adapted_token_bytes=sum(sizes),
            )
            case = f"{rows} tokens after {prompt} for {name}"
            self._measured.samples.append(Sample(case, batch, end - begin))

    def _mixed(self, in_slots: Sequence[str]) -> None:
        """Steps with a prompt beside requests that generate."""
        lengths = [length for length in _BESIDE if length < self._limits.max_model_len / 2]
        for rows in sorted({min(_STREAMS, self._seqs - 1), self._seqs - 1}):
            for models in filter(None, ([self._model], list(in_slots))):
                self._progress(f"prompts beside {rows} requests")
                chosen = [models[n % len(models)] for n in range(rows)]
                late = [Ask(chosen[-1], n, 1) for n in lengths for _ in range(_REPEATS)]
                streams, answers = self._client.beside(
                    [Ask(model, _SHORT_PROMPT, self._longest) for model in chosen], late
                )
                self._client.together([Ask(self._model, _SHORT_PROMPT, 1)])
                for answer in answers:
                    self._note_mixed(streams, answer)

    def _note_mixed(self, streams: Sequence[Answer], answer: Answer) -> None:
        steps = _steps(streams)
        age, (begin, end) = min(
            enumerate(steps, 1), key=lambda step: abs(step[1][1] - answer.tokens_s[0])
        )
        prompt, size = answer.ask.prompt_tokens, self._size(answer.ask.model)
        sizes = [self._size(stream.ask.model) for stream in streams]
        batch = Batch(
            prompt_tokens=prompt,
            rows=len(streams) + 1,
            prompt_pairs=pairs_of(prompt),
            context_tokens=len(streams) * (_SHORT_PROMPT + age),
            adapter_bytes=sum(map(self._size, {stream.ask.model for stream in streams})),
            adapted_tokens=sum(each > 0 for each in sizes) + prompt * (size > 0),
            adapted_token_bytes=sum(sizes) + prompt * size,
        )
        kind = "with adapters" if size else "without"
        case = f"prompt of {prompt} beside {len(streams)} {kind}"
        self._measured.samples.append(Sample(case, batch, end - begin))

    def _size(self, model: str) -> int:
        return self._measured.sizes.get(model, 0)

    @property
    def _seqs(self) -> int:
        return self._limits.max_num_seqs

    @property
    def _longest(self) -> int:
        return self._limits.max_model_len - _SHORT_PROMPT - 1

    def _alone(self, model: str, prompt: int, times: int) -> list[float]:
        """Times to the first token of requests one after another."""
        asks = [Ask(model, prompt, 1)] * times
        return [self._client.together([ask])[0].first_token_s for ask in asks]


def _steps(answers: Sequence[Answer]) -> list[tuple[float, float]]:
    """When each step began and ended in which all of the requests got a token."""
    last = max(answers, key=lambda answer: answer.tokens_s[0])
    end = min(answer.tokens_s[-1] for answer in answers)
    times = sorted(set(last.tokens_s))
    return [(a, b) for a, b in pairwise(times) if b <= end]
