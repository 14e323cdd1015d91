"""Measures a server's steps and loads through its HTTP routes, and makes a calibration of them.

The content of each step is known, because nothing else uses the server. Requests that are sent
together generate together, so their time per token is that of a step with all of them. A single
request's time to its first token is that of a step with its prompt, plus the request's overhead.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vllm_multilora.toolbox.capacity.calibration import CalibrationError, LoadCosts, Ranges
from vllm_multilora.toolbox.capacity.fitting import Sample
from vllm_multilora.toolbox.capacity.step_cost import RANGED, StepBatch, pairs_of
from vllm_multilora.toolbox.capacity.timing import (
    SHORT_PROMPT,
    STREAMS,
    Timed,
    steps_of,
    time_loads,
)
from vllm_multilora.toolbox.clients.completions import Answer, Ask
from vllm_multilora.wording import counted

_DECODED, _REPEATS, _LATE, _LOT, _LOTS = 24, 5, 16, 4, 8
_MIN_MODEL_LEN = 4 * SHORT_PROMPT + _DECODED
_PROMPTS = (8, 32, 128, 512, 2048)
_BESIDE = (32, 128)
_GOLDEN, _SPREAD = 0.618, 3
"""Late requests are sent at times that are spread evenly over so many steps, and so cover a step
evenly, however long it is.
"""


class Measuring:
    """One run of all measurements of a server.

    Attributes:
        loads: What loads take; None if none was timed.
        sizes: Bytes by adapter, of those that were loaded.
        missed_s: Of each late request, the seconds of steps between the one in which it was sent
            and the one that had it.
    """

    def __init__(self, server: Timed) -> None:
        self._server = server
        self._settings = server.settings
        self._seqs = server.settings.max_num_seqs
        self.samples: list[Sample] = []
        self.loads: LoadCosts | None = None
        self.sizes: dict[str, int] = {}
        self.missed_s: list[float] = []

    def run(self) -> None:
        """Measures; a minute or two where a step takes 0.1 seconds.

        Raises:
            CalibrationError: The server takes too short requests.
            UnreachableError: It does not answer.
        """
        server = self._server
        if self._settings.max_model_len < _MIN_MODEL_LEN:
            raise CalibrationError(
                f"the server accepts {self._settings.max_model_len} tokens per request, but "
                f"calibrating it needs at least {_MIN_MODEL_LEN}"
            )
        server.alone(server.model, SHORT_PROMPT, times=3)
        server.progress(f"loads of adapters from {server.source}")
        self.loads, self.samples = time_loads(server)
        in_slots = self._in_slots()
        self._prompts([server.model, *dict.fromkeys((*in_slots[:1], *in_slots[-1:]))])
        self._generation(in_slots)
        self._mixed(in_slots)

    @property
    def request_beside_s(self) -> float | None:
        """Seconds of a request outside the engine while that computes; None if not known.

        Requests that are sent at any time of a step miss the next one the more often the longer
        their way is: on average they lose just so much.
        """
        return statistics.mean(self.missed_s) if self.missed_s else None

    @property
    def ranges(self) -> Ranges:
        """The most of everything."""
        most = {name: max(getattr(s.batch, name) for s in self.samples) for name in RANGED}
        largest = max(self.sizes.values(), default=0) if self.loads else 0
        return Ranges(**most, load_bytes=largest)

    def _in_slots(self) -> list[str]:
        """The loaded adapters that can be asked for without a load; the smallest first."""
        listed = self._server.list_adapters()
        self.sizes |= {each.name: each.bytes for each in listed if each.bytes}
        slots = [each.name for each in listed if each.state == "slot" and each.name in self.sizes]
        return sorted(slots, key=self.sizes.__getitem__)

    def _prompts(self, models: Sequence[str]) -> None:
        most = min(self._settings.max_num_batched_tokens, self._settings.max_model_len - 1)
        lengths = sorted({*(p for p in _PROMPTS if p < most), most})
        for model in models:
            self._server.progress(f"prompts for {model}")
            for length in lengths:
                batch = self._batch([], [Ask(model, length, 1)])
                self.samples += [
                    Sample(f"prompt of {length} for {model}", batch, seconds, has_request=True)
                    for seconds in self._server.alone(model, length, times=_REPEATS)
                ]

    def _generation(self, in_slots: Sequence[str]) -> None:
        for rows in sorted({1, min(4, self._seqs), -(-self._seqs // 2), self._seqs}):
            self._server.progress(f"generation for {counted(rows, 'request')}")
            mixes = [[self._server.model], in_slots[:1], in_slots[-1:]]
            if rows > 1 and len(in_slots) > 2:
                mixes.append(list(in_slots))
            for models in filter(None, mixes):
                self._generate(rows, models, SHORT_PROMPT)
        long = self._settings.max_model_len - _DECODED - 1
        self._generate(min(4, self._seqs), [self._server.model], long)

    def _generate(self, rows: int, models: Sequence[str], prompt: int) -> None:
        asks = [Ask(models[n % len(models)], prompt, _DECODED + 1) for n in range(rows)]
        adapters = len({ask.model for ask in asks})
        name = models[0] if len(models) == 1 else f"{adapters} adapters"
        case = f"{counted(rows, 'token')} after {prompt} for {name}"
        for age, (begin, end) in enumerate(steps_of(self._server.client.together(asks)), 1):
            self.samples.append(Sample(case, self._batch(asks, [], age), end - begin))

    def _mixed(self, in_slots: Sequence[str]) -> None:
        """Steps with prompts beside requests that generate: with one, and with several."""
        lengths = [length for length in _BESIDE if length < self._settings.max_model_len / 2]
        generated = [s.seconds for s in self.samples if not s.batch.prompt_tokens]
        spread_s = _SPREAD * statistics.median(generated)
        for rows in sorted({min(STREAMS, self._seqs - 1), self._seqs - 1}):
            for models in filter(None, ([self._server.model], list(in_slots))):
                self._server.progress(f"prompts beside {counted(rows, 'request')}")
                chosen = [models[n % len(models)] for n in range(rows)]
                single = [
                    [Ask(chosen[-1], lengths[n % len(lengths)], 1, spread_s * (n * _GOLDEN % 1))]
                    for n in range(_LATE)
                ]
                streams, answers = self._server.beside(chosen, single)
                self._note_missed(streams, [answer for (answer,) in answers])
                self._note_mixed(streams, answers)
                lots = [self._lot(models, lengths[n % len(lengths)], rows) for n in range(_LOTS)]
                if all(lots):
                    self._note_mixed(*self._server.beside(chosen, lots))

    def _lot(self, models: Sequence[str], length: int, rows: int) -> list[Ask]:
        """Requests with prompts that one step can have beside so many that generate; or none."""
        room = (self._settings.max_num_batched_tokens - rows) // length
        count = min(_LOT, self._seqs - rows, room)
        return [Ask(models[n % len(models)], length, 1) for n in range(count)] if count > 1 else []

    def _note_missed(self, streams: Sequence[Answer], answers: Sequence[Answer]) -> None:
        steps = steps_of(streams)
        for answer in answers:
            begin, _ = steps[_step_of(answer, steps)]
            boundary = next((each for _, each in steps if each > answer.begin_s), begin)
            self.missed_s.append(max(0.0, begin - boundary))

    def _note_mixed(self, streams: Sequence[Answer], lots: Sequence[Sequence[Answer]]) -> None:
        """Notes the steps that had prompts; a lot may have come in several."""
        steps = steps_of(streams)
        running = [stream.ask for stream in streams]
        for lot in lots:
            places = [_step_of(answer, steps) for answer in lot]
            for place in dict.fromkeys(places):
                late = [answer.ask for answer, at in zip(lot, places, strict=True) if at == place]
                batch = self._batch(running, late, place + 1)
                tokens = batch.prompt_tokens
                kind = "with adapters" if batch.adapter_bytes else "without"
                what = f"{len(late)} prompts" if len(late) > 1 else "prompt"
                case = f"{what} of {tokens} beside {len(running)} {kind}"
                begin, end = steps[place]
                self.samples.append(Sample(case, batch, end - begin))

    def _batch(self, running: Sequence[Ask], late: Sequence[Ask], age: int = 0) -> StepBatch:
        """A step of requests that have generated `age` tokens, and of others with their prompts."""
        sizes = {ask.model: self.sizes.get(ask.model, 0) for ask in (*running, *late)}
        computed = [(1, sizes[ask.model]) for ask in running]
        computed += [(ask.prompt_tokens, sizes[ask.model]) for ask in late]
        return StepBatch(
            prompt_tokens=sum(ask.prompt_tokens for ask in late),
            rows=len(computed),
            prompt_pairs=sum(pairs_of(ask.prompt_tokens) for ask in late),
            context_tokens=sum(ask.prompt_tokens + age for ask in running),
            adapter_bytes=sum(sizes.values()),
            adapted_tokens=sum(count for count, size in computed if size),
            adapted_token_bytes=sum(count * size for count, size in computed),
        )


def _step_of(answer: Answer, steps: Sequence[tuple[float, float]]) -> int:
    """The place among all steps of the one at whose end a first token came."""
    return min(range(len(steps)), key=lambda place: abs(steps[place][1] - answer.tokens_s[0]))
