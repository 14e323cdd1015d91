"""Measuring a server that takes exactly what a model says: the fit finds the model."""

import pytest

from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.calibration import CalibrationError, LoadCosts, Settings
from vllm_multilora.toolbox.capacity.fitting import Sample, fit
from vllm_multilora.toolbox.capacity.measuring import Measuring
from vllm_multilora.toolbox.capacity.step_cost import TERMS, StepBatch, StepCost, pairs_of
from vllm_multilora.toolbox.capacity.timing import Adapter, Timed
from vllm_multilora.toolbox.clients.completions import Answer

SECONDS = {
    "step": 0.05,
    "prompts_at_all": 0.004,
    "prompt_token": 0.0004,
    "prompt_token_squared": 2e-7,
    "generated_token": 0.001,
    "prompt_pair": 1e-7,
    "context_token": 2e-6,
    "adapters_at_all": 0.005,
    "adapter_mib": 0.0002,
    "adapted_token": 0.00002,
    "adapted_token_mib": 0.00001,
    "row_beside_prompts": 0.0005,
    "load_beside": 0.003,
}
REQUEST_S, BESIDE_S = 0.006, 0.02
LOAD_S, LOAD_S_PER_MIB, SLOWDOWN, COPY_S = 0.06, 0.004, 2.0, 0.02
COST = StepCost(SECONDS)
SIZES = {f"a{n}": (n % 4 + 1) * 8 * MIB for n in range(16)}
SLOTS = 8


class Server:
    """Answers at once, with the times that the model says; nobody waits for anybody."""

    def __init__(self, adapters=SIZES, slowdown=SLOWDOWN):
        self.now = 0.0
        self.slots: list[str] = []
        self.host: set[str] = set()
        self.adapters = adapters
        self.slowdown = slowdown

    def listed(self):
        return [
            Adapter(name, self.state(name), size if name in self.host else 0)
            for name, size in self.adapters.items()
        ]

    def state(self, name):
        return "slot" if name in self.slots else "host" if name in self.host else "absent"

    def fetched(self, model, slowdown=1.0):
        """Seconds until an adapter is in a slot."""
        if model not in self.adapters or model in self.slots:
            return 0.0
        load = LOAD_S + LOAD_S_PER_MIB * self.adapters[model] / MIB
        seconds = COPY_S + (0 if model in self.host else load * slowdown)
        self.host.add(model)
        self.slots = [*self.slots, model][-SLOTS:]
        return seconds

    def batch(self, running, late=(), age=0, is_loading=False):
        """A batch of running requests, and of late ones whose prompts are computed."""
        asks = [*running, *late]
        tokens = [(ask, 1) for ask in running] + [(ask, ask.prompt_tokens) for ask in late]
        size = {ask.model: self.adapters.get(ask.model, 0) for ask in asks}
        return StepBatch(
            prompt_tokens=sum(ask.prompt_tokens for ask in late),
            rows=len(asks),
            prompt_pairs=sum(pairs_of(ask.prompt_tokens) for ask in late),
            context_tokens=sum(ask.prompt_tokens + age for ask in running),
            adapter_bytes=sum(size.values()),
            adapted_tokens=sum(n for ask, n in tokens if size[ask.model]),
            adapted_token_bytes=sum(n * size[ask.model] for ask, n in tokens),
            is_loading=is_loading,
        )

    def together(self, asks):
        answers = [Answer(ask, self.now) for ask in asks]
        if len(asks) == 1:
            fetched = self.fetched(asks[0].model)
            self.now += REQUEST_S + fetched + COST.of(self.batch([], asks))
        for age in range(asks[0].new_tokens):
            self.now += COST.of(self.batch(asks, age=age)) if age else 0.0
            for answer in answers:
                answer.tokens_s.append(self.now)
        return answers

    def beside(self, asks, late):
        streams, answers = [Answer(ask, self.now) for ask in asks], []

        def step(lot=(), *, is_loading=False):
            age = len(streams[0].tokens_s)
            self.now += COST.of(self.batch(asks, lot, age, is_loading=is_loading))
            for stream in streams:
                stream.tokens_s.append(self.now)

        step()
        for lot in late:
            ask = lot[0]
            step()
            step()
            half = COST.of(self.batch(asks)) / 2
            answer = Answer(ask, self.now - half)
            if ask.delay_s:  # sent at its own time of a step, it is on its way for a part of one
                before = COST.of(self.batch(asks, age=len(streams[0].tokens_s) - 1))
                answer.begin_s = self.now - before + ask.delay_s % before
                if answer.begin_s + BESIDE_S > self.now:
                    step()
            lot_answers = [answer, *(Answer(other, answer.begin_s) for other in lot[1:])]
            answers.append(lot_answers)
            seconds = self.fetched(ask.model, self.slowdown)
            if seconds > COPY_S:
                ready = self.now + seconds - COPY_S
                while self.now + half < ready:
                    step(is_loading=True)
                step()  # during which its request reaches the scheduler
                step()  # in which it is copied
            step(lot)
            for each in lot_answers:
                each.tokens_s.append(self.now)
        return streams, answers


def measuring(server, progress=lambda what: None, longest=512):
    """The measurements of a server that have not begun yet."""
    settings = Settings(
        max_num_seqs=16, max_num_batched_tokens=512, max_model_len=longest, max_loras=SLOTS
    )
    return Measuring(Timed(server, "base", settings, server.listed, "page cache", progress))


def test_the_fit_finds_what_the_server_takes():
    server = Server()
    measured = measuring(server)
    measured.run()
    found = fit(measured.samples)
    assert set(found.seconds) == set(TERMS)
    # Contexts beside loads are not followed, and so what goes with them is a little off.
    assert found.seconds == pytest.approx(SECONDS, rel=0.25)
    assert found.request_s == pytest.approx(REQUEST_S, rel=0.1)
    assert found.residual.rms < 0.01
    assert measured.request_beside_s == pytest.approx(BESIDE_S, rel=0.25)

    loads = measured.loads
    assert loads.fixed_s == pytest.approx(LOAD_S, rel=0.1)
    assert loads.s_per_mib == pytest.approx(LOAD_S_PER_MIB, rel=0.1)
    assert loads.copy_fixed_s == pytest.approx(COPY_S, rel=0.1)
    expected = SLOWDOWN * (LOAD_S + LOAD_S_PER_MIB * 20)
    assert loads.seconds(20 * MIB, computing=True) == pytest.approx(expected, rel=0.25)
    assert loads.beside_s_per_mib > loads.s_per_mib
    assert (loads.source, loads.measured) == ("page cache", 13)

    ranges = measured.ranges
    assert (ranges.prompt_tokens, ranges.rows, ranges.load_bytes) == (511, 16, 32 * MIB)
    assert measured.sizes == {name: SIZES[name] for name in server.host}


class LaggingServer(Server):
    """Lists its adapters as they were a while ago, as a server does that is asked often."""

    def __init__(self, adapters):
        super().__init__(adapters)
        self.last = super().listed()

    def listed(self):
        shown, self.last = self.last, super().listed()
        return shown


def test_an_adapter_that_is_listed_late_is_timed():
    measured = measuring(LaggingServer({"only": 8 * MIB}))
    measured.run()
    assert measured.loads.measured == 1
    assert measured.sizes == {"only": 8 * MIB}


def test_loads_that_fit_together_are_not_doubted():
    measured = measuring(Server())
    measured.run()
    assert measured.loads.spread < 0.1
    assert measured.loads.doubt(measured.ranges.load_bytes) == ""


def test_loads_that_steps_slow_down_out_of_measure_are_doubted():
    measured = measuring(Server(slowdown=40.0))
    measured.run()
    doubt = measured.loads.doubt(measured.ranges.load_bytes)
    assert doubt.startswith("a load of 32.0 MiB would take ")
    assert "s beside steps, and 0.19 s of an idle engine" in doubt


def test_loads_far_from_what_was_fitted_are_doubted():
    costs = LoadCosts(
        fixed_s=0.1,
        s_per_mib=0.0,
        beside_fixed_s=0.1,
        beside_s_per_mib=0.0,
        copy_fixed_s=0.0,
        copy_s_per_mib=0.0,
        source="disk",
        measured=4,
        spread=0.8,
    )
    assert costs.doubt(MIB) == "timed loads are 80% from what was fitted to them"


def test_what_is_measured_is_reported():
    server, reported = Server(), []
    measuring(server, reported.append).run()
    assert {"generation for 1 request", "generation for 16 requests"} <= set(reported)


def test_without_cold_adapters_nothing_is_known_of_loads():
    measured = measuring(Server({}))
    measured.run()
    assert measured.loads is None
    found = fit(measured.samples)
    assert found.seconds["step"] == pytest.approx(SECONDS["step"], rel=0.02)
    assert found.seconds["adapter_mib"] == 0


def test_a_server_of_short_requests_is_refused():
    with pytest.raises(
        CalibrationError,
        match="accepts 64 tokens per request, but calibrating it needs at least 88",
    ):
        measuring(Server(), longest=64).run()


def test_nothing_costs_less_than_nothing():
    """Larger prompts that take less time are noise: the term is left out."""
    found = fit([Sample(str(n), StepBatch(prompt_tokens=n), 1 - n / 100) for n in range(1, 5)])
    assert found.seconds["prompt_token"] == 0
    # All of these steps have prompts: what of it is the steps' own cannot be told.
    fixed = found.seconds["step"] + found.seconds["prompts_at_all"]
    assert fixed == pytest.approx(0.975, abs=0.001)


def test_a_case_weighs_the_same_however_often_it_was_measured_and_the_worst_is_named():
    samples = [*[Sample("short", StepBatch(), 1.0)] * 24, Sample("long", StepBatch(), 2.0)]
    found = fit(samples)
    assert found.seconds["step"] == pytest.approx(1.2)
    assert found.residual.worst_case == "long"
