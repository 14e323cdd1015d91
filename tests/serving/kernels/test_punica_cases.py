"""The punica wrapper does to a layer's output what vLLM's wrapper would, on every backend."""

import pytest
import torch

from tests.kernels.triton.triton_problems import watched

from .punica_cases import CASES, DEVICE, Case, assert_close, expanded, linear, shrunk

pytestmark = pytest.mark.serving  # imports vLLM

BACKENDS = [*(["native"] if DEVICE == "cpu" else []), "torch", "triton"]
VOCABULARY = 100  # what Case.wrapper tells the wrapper


@pytest.fixture(autouse=True)
def _interpreter_mode(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with watched():  # no interpreted kernel may reach beside its tensors
        yield


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def absolute(*tensors):
    return tuple(
        tuple(t.abs() for t in tensor) if isinstance(tensor, tuple) else tensor.abs()
        for tensor in tensors
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "triton-invariant"])
def test_add_lora_linear(case: Case, backend: str):
    a, b = case.lora_a(), case.lora_b()
    x = case.random(case.tokens, case.k, seed=20)
    y = case.random(case.tokens, sum(case.widths), seed=21)
    out = y.clone()
    case.wrapper(backend).add_lora_linear(out, x, a, b, 1.0, case.widths)
    expected = linear(y, x, a, b, case.token_slots)
    assert_close(out, expected, linear(*absolute(y, x, a, b), case.token_slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_lora_linear_apart_from_the_base_output(case: Case, backend: str):
    """The call of vLLM's second stream: into zeros that are added to the base's output later."""
    a, b = case.lora_a(), case.lora_b()
    x = case.random(case.tokens, case.k, seed=20)
    zeros = torch.zeros(case.tokens, sum(case.widths), dtype=case.dtype, device=DEVICE)
    out, wrapper = zeros.clone(), case.wrapper(backend)
    for _ in range(2):  # written, not added: the second call changes nothing
        wrapper.add_lora_linear(out, x, a, b, 1.0, case.widths, add_inputs=False)
    magnitude = linear(zeros, *absolute(x, a, b), case.token_slots)
    assert_close(out, linear(zeros, x, a, b, case.token_slots), magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_lora_linear_with_a_batch_dimension_in_front(backend: str):
    case = CASES["qkv"]
    a, b = case.lora_a(), case.lora_b()
    x = case.random(1, case.tokens, case.k, seed=20)
    y = case.random(1, case.tokens, sum(case.widths), seed=21)
    out = y.clone()
    case.wrapper(backend).add_lora_linear(out, x, a, b, 1.0, case.widths)
    expected = linear(y[0], x[0], a, b, case.token_slots)
    assert_close(out[0], expected, linear(*absolute(y[0], x[0], a, b), case.token_slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_shrink_leaves_every_row_finished(case: Case, backend: str):
    """Ranks that are sharded over workers are gathered next: rows without adapter are zeros."""
    a = case.lora_a()
    x = case.random(case.tokens, case.k, seed=20)
    h = torch.full((len(a), case.tokens, case.rank), float("nan"), device=DEVICE)
    case.wrapper(backend).add_shrink(h, x, a, 1.0)
    expected = torch.stack([shrunk(x, w, case.token_slots, 1.0) for w in a])
    magnitude = [shrunk(*absolute(x, w), case.token_slots, 1.0) for w in a]
    assert_close(h, expected, torch.stack(magnitude))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("offset", "add_inputs"), [(0, True), (7, False)], ids=["adding", "overwriting-from-7"]
)
def test_add_expand(case: Case, backend: str, offset: int, add_inputs: bool):
    b = case.lora_b()
    h = case.random(len(b), case.tokens, case.rank, seed=22).float()
    y = case.random(case.tokens, offset + sum(case.widths) + 3, seed=21)
    out = y.clone()
    case.wrapper(backend).add_expand(
        out, h, b, case.widths, offset_start=offset, add_inputs=add_inputs
    )
    before = y.clone()
    if not add_inputs:
        before[:, offset : offset + sum(case.widths)] = 0
    expected = expanded(before, h, b, case.token_slots, offset)
    assert_close(out, expected, expanded(*absolute(before, h, b), case.token_slots, offset))
    assert out[:, :offset].equal(y[:, :offset])
    assert out[:, -3:].equal(y[:, -3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_layer(case: Case, backend: str):
    """As vLLM's layer does it: look up A's rows at the wrapper's offsets, then expand."""
    wrapper, width = case.wrapper(backend), case.widths[0]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (case.tokens,), generator=generator).to(DEVICE)
    a = case.random(len(case.slots), VOCABULARY, case.rank)
    (b,) = case.lora_b()[:1]
    y = case.random(case.tokens, width, seed=21)
    out = y.clone()
    rows = torch.nn.functional.embedding(
        ids + wrapper._embeddings_indices[: case.tokens], a.flatten(0, 1)
    )
    wrapper.add_lora_embedding(out, rows, b, add_input=True)
    own = torch.stack([a[max(slot, 0), i] for slot, i in zip(case.token_slots, ids, strict=True)])
    expected = expanded(y, own[None], (b,), case.token_slots)
    assert_close(out, expected, expanded(*absolute(y, own[None], (b,)), case.token_slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_lora_logits_follows_the_sampled_rows(case: Case, backend: str):
    """One row per request; logits have padding columns behind the vocabulary."""
    check_logits(case, backend, columns=5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [-4, 0], ids=["fewer", "equal"])
def test_add_lora_logits_of_no_more_columns_than_the_weights(backend: str, columns: int):
    """A classification head may have fewer labels than the stacked weights have rows."""
    check_logits(CASES["prefill-lengths"], backend, columns=columns)


def check_logits(case: Case, backend: str, *, columns: int) -> None:
    (a,), (b,) = case.lora_a()[:1], case.lora_b()[:1]
    rows, width = len(case.lengths), case.widths[0] + columns
    x, y = case.random(rows, case.k, seed=20), case.random(rows, width, seed=21)
    out = y.clone()
    case.wrapper(backend).add_lora_logits(out, x, a, b, 1.0)
    own = b[:, :, :width]
    expected = linear(y, x, (a,), (own,), case.request_slots)
    magnitude = linear(*absolute(y, x, (a,), (own,)), case.request_slots)
    assert_close(out, expected, magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_lora_full_linear_replaces_rows_of_adapters_with_a_head(backend: str):
    case = Case((2, 1, 3, 1), (1, 2, 0, 3), (3, 1, 2), k=40, widths=(5,), rank=5)
    weight, bias = case.random(3, 1, 5, 40), case.random(3, 5, seed=1)
    enabled = torch.tensor([True, True, False], device=DEVICE)  # adapter 2 brings no head
    x, y = case.random(4, 40, seed=20), case.random(4, 5, seed=21)
    out = y.clone()
    case.wrapper(backend).apply_lora_full_linear(out, x, weight, bias, enabled)
    for row, slot in enumerate(case.request_slots):
        if slot >= 0 and enabled[slot]:
            expected = x[row].double() @ weight[slot, 0].double().T + bias[slot].double()
            assert_close(out[row], expected, expected.abs() + 10)
        else:
            assert out[row].equal(y[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_past_the_batch_are_left_alone(backend: str):
    """A captured graph runs with more rows than the batch has tokens."""
    case = CASES["qkv"]
    a, b, wrapper = case.lora_a(), case.lora_b(), case.wrapper(backend)
    padded = case.tokens + 5
    x = case.random(padded, case.k, seed=20)
    x[case.tokens :] = float("nan")
    y = case.random(padded, sum(case.widths), seed=21)
    for add_inputs in (True, False):
        out = y.clone()
        wrapper.add_lora_linear(out, x, a, b, 1.0, case.widths, add_inputs=add_inputs)
        before = y[: case.tokens] if add_inputs else torch.zeros_like(y[: case.tokens])
        expected = linear(before, x, a, b, case.token_slots)
        magnitude = linear(*absolute(before, x, a, b), case.token_slots)
        assert_close(out[: case.tokens], expected, magnitude)
        assert out[case.tokens :].equal(y[case.tokens :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_reads_only_the_true_ranks(backend: str):
    """Weights past an adapter's rank are poisoned; a slice of rank 0 is not adapted at all."""
    case = CASES["qkv"]
    a, b = case.lora_a(), case.lora_b()
    ranks = torch.tensor([[3, 16], [0, 5], [16, 0]], dtype=torch.int32, device=DEVICE)
    clean_a, clean_b = ([w.clone() for w in weights] for weights in (a, b))
    for i, slot_ranks in enumerate(ranks.tolist()):
        for slot, rank in enumerate(slot_ranks):
            a[i][slot, :, rank:], b[i][slot, :, :, rank:] = float("nan"), float("nan")
            clean_a[i][slot, :, rank:], clean_b[i][slot, :, :, rank:] = 0, 0
    x = case.random(case.tokens, case.k, seed=20)
    y = case.random(case.tokens, sum(case.widths), seed=21)
    out = y.clone()
    case.wrapper(backend).for_layer(ranks, ranks).add_lora_linear(out, x, a, b, 1.0, case.widths)
    weights = tuple(clean_a), tuple(clean_b)
    magnitude = linear(*absolute(y, x, *weights), case.token_slots)
    assert_close(out, linear(y, x, *weights, case.token_slots), magnitude)
