"""Who may enter a comparison, and that whoever cannot is named with the reason."""

import torch

from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.batches import BatchSpec, Layer, build
from tools.kernels.measure.contenders import (
    ContenderUnavailableError,
    Multilora,
    load_contenders,
)


class Two:
    @classmethod
    def contenders(cls):
        return Multilora("torch"), Multilora("native")


class Unable:
    @classmethod
    def contenders(cls):
        raise ContenderUnavailableError("needs another machine")


def test_a_class_enters_as_many_contenders_as_it_likes():
    entered = load_contenders([f"{__name__}:Two"])
    assert [c.name for c in entered.contenders] == ["multilora (torch)", "multilora (native)"]
    assert entered.left_out == ()


def test_who_cannot_be_had_is_named_with_the_reason():
    absent, *others = (
        "no_such_package:Contender",
        f"{__name__}:Gone",
        f"{__name__}:Unable",
        f"{__name__}:Two",
    )
    entered = load_contenders([absent, *others])
    assert len(entered.contenders) == 2
    reasons = dict(entered.left_out)
    assert "No module named 'no_such_package'" in reasons[absent]
    assert "Gone" in reasons[others[0]]
    assert reasons[others[1]] == "ContenderUnavailableError: needs another machine"


def test_these_kernels_compute_the_batch():
    batch = build(BatchSpec(Layer("small", 32, (48, 16)), tokens=9, max_loras=4))
    error = Expected(batch).relative_error(Multilora("torch").prepare(batch))
    assert error <= TOLERANCES[torch.bfloat16]
