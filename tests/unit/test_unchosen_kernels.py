"""Layers whose kernels are never chosen are named in the log."""

import logging

import pytest
from vllm.lora.layers import FusedMoEWithLoRA, ReplicatedLinearWithLoRA

from vllm_multilora.integration.step.stock_rows import ClassificationHead
from vllm_multilora.integration.worker.kernel_choice.reporting import report_unchosen


def layer_of(kind: type) -> object:
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((ReplicatedLinearWithLoRA,), []),
        (
            (ReplicatedLinearWithLoRA, FusedMoEWithLoRA, FusedMoEWithLoRA),
            ["vLLM's serve experts, since ours do not take rows by expert."],
        ),
        (
            (FusedMoEWithLoRA, ClassificationHead),
            [
                "vLLM's serve experts, since ours do not take rows by expert; "
                "ours serve classification heads unchecked, once a request."
            ],
        ),
    ],
    ids=["none", "experts", "both"],
)
def test_report_of_layers_without_a_choice_names_them(caplog, kinds, said):
    with caplog.at_level(logging.INFO, "vllm_multilora"):
        report_unchosen([layer_of(kind) for kind in kinds], "H100")
    assert caplog.messages == [f"LoRA kernels on H100, without a choice: {text}" for text in said]
