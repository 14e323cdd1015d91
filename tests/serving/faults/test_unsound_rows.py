"""What is done around sampling: NaN by request, whose rows draw no tokens, and tokens named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.serving  # imports vLLM


@pytest.mark.parametrize(
    ("counts", "rows", "expected"),
    [
        ([0, 0, 7, 0, 1, 0], [4, 1, 1], [7, 1, 0]),
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([5, 6], [0, 2, 0], [0, 11, 0]),
        ([5, 6, 9, 9], [1, 1], [5, 6]),  # padding rows at the end
    ],
    ids=["drafted", "one-each", "none-for-some", "padded"],
)
def test_rows_are_added_up_by_request(counts, rows, expected):
    from vllm_multilora.integration.worker.sampling import by_request

    found = by_request(torch.tensor(counts, dtype=torch.int32), np.array(rows))
    assert found.tolist() == expected
    assert found.dtype is torch.int32


@pytest.fixture
def runner(monkeypatch):
    """A model runner with our manager, as far as these functions look at one."""
    from vllm_multilora.integration.worker import manager as worker_manager
    from vllm_multilora.integration.worker import sampling
    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

    model_manager = MultiLoRAModelManager.__new__(MultiLoRAModelManager)
    model_manager.punica_wrapper_mapping = {}
    model_manager.keeps_row_maxima = True
    manager = SimpleNamespace(
        sampled_rows=np.array([3, 1]),
        idle_generators={},
        model_manager=model_manager,
        activate_batch=lambda *args: None,
    )
    for module in (sampling, worker_manager):
        monkeypatch.setattr(module, "manager_of", lambda runner: manager)
    return SimpleNamespace(
        manager=manager,
        device=torch.device("cpu"),
        requests={},
        input_batch=SimpleNamespace(generators={}, lora_id_to_lora_request={}),
        discard_request_mask=SimpleNamespace(np=np.zeros(8, dtype=bool)),
    )


class Model(torch.nn.Module):
    """One whose logits are what it is given."""

    def compute_logits(self, hidden_states):
        return hidden_states


def counted(runner, logits, sample=lambda logits: None):
    """What vLLM's first model runner counts in a step.

    Args:
        runner: The model runner.
        logits: [rows, vocabulary].
        sample: Stands for what samples from logits.
    """
    from vllm.v1.worker.gpu_model_runner import count_nans_per_row

    from vllm_multilora.integration.step.output_rows import with_known_rows
    from vllm_multilora.integration.worker.sampling import bookkeeping_sync

    def original(runner, scheduled, sampled, logits, states):
        assert logits.shape[1] == 1, "one number a row is all that vLLM is given"
        return count_nans_per_row(logits).tolist()

    model = with_known_rows(Model())
    model.lora_manager = runner.manager.model_manager
    sample(model.compute_logits(logits))
    return bookkeeping_sync(original, runner, None, None, logits, None)


@pytest.mark.smoke
def test_the_first_model_runner_counts_by_request(runner):
    logits = torch.zeros(4, 9)
    logits[1, 3:5] = float("nan")
    assert counted(runner, logits) == [1, 0]
    logits[1], logits[3, 0] = 0, float("nan")
    assert counted(runner, logits) == [0, 1]


@pytest.mark.smoke
def test_nan_that_a_requests_own_parameters_make_is_not_counted(runner):
    """vLLM samples from logits of float32 in place."""
    from vllm._custom_ops import apply_repetition_penalties_torch

    def sample(logits):
        logits[:, 3] = float("-inf")  # not among its `allowed_token_ids`
        is_in_prompt = torch.ones_like(logits, dtype=torch.bool)
        is_in_answer = torch.zeros_like(is_in_prompt)
        apply_repetition_penalties_torch(
            logits, is_in_prompt, is_in_answer, torch.full((4,), 1e-300)
        )
        assert logits.isnan().any(dim=1).all()

    assert counted(runner, torch.ones(4, 9), sample) == [0, 0]
    runner.manager.sampled_rows = np.ones(4, dtype=int)
    assert counted(runner, torch.ones(4, 9), sample) == [0, 0, 0, 0]


@pytest.mark.smoke
def test_the_first_model_runner_finds_nan_among_other_rows(runner):
    """NaN wherever the row had one."""
    infinity, nan = float("inf"), float("nan")
    logits = torch.zeros(4, 70_000, dtype=torch.bfloat16)
    logits[0, 0], logits[1, 69_999], logits[2, 5], logits[3, 6] = infinity, nan, nan, -infinity
    logits[2, 4], logits[2, 6] = infinity, -infinity
    runner.manager.sampled_rows = np.ones(4, dtype=int)

    assert counted(runner, logits) == [0, 1, 1, 0]


def test_seeded_requests_amidst_their_prompts_draw_nothing_on_cpus(runner):
    from vllm_multilora.integration.worker.manager import set_active_loras
    from vllm_multilora.integration.worker.sampling import bookkeeping_sync

    seeded = {row: torch.Generator().manual_seed(row) for row in (0, 2, 3)}
    generators = runner.input_batch.generators
    generators.update(seeded)
    runner.discard_request_mask.np[[1, 2]] = True
    seen = []

    def note(runner, *args):
        seen.append(set(runner.input_batch.generators))

    for _ in range(2):
        set_active_loras(None, runner, runner.input_batch, np.ones(4, dtype=int))
        bookkeeping_sync(note, runner, None, None, torch.zeros(4, 9), None)
        assert generators == seeded
    assert seen == [{0, 3}] * 2


@pytest.mark.smoke
def test_the_second_model_runner_counts_by_request(runner):
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from vllm_multilora.integration.worker.sampling import sample

    batch = SimpleNamespace(cu_num_logits_np=np.array([0, 3, 4]))
    given = torch.tensor([0, 0, 2, 0], dtype=torch.int32)

    def original(runner, states, batch, grammar):
        return SamplerOutput(None, None, given, None, None), "sampled", "rejected"

    output, *rest = sample(original, runner, None, batch, None)
    assert output.num_nans.tolist() == [2, 0]
    assert rest == ["sampled", "rejected"]
