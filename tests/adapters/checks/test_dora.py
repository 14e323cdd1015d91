"""DoRA adapters: what is refused, with and without `--multilora-dora`, and what is packed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from multilora_kernels.dtypes import BFLOAT16
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.validation import validate

from ..corpus import DORA_LAYOUT, LAYOUT
from ..corpus.bad_dora import magnitude_of, make_dora
from ..corpus.draft import Q0, good
from ..corpus.llama_layout import MODULES
from ..packs import take


def test_a_good_one_is_taken_where_there_is_room_for_magnitudes_only(tmp_path: Path) -> None:
    folder = make_dora(good()).write(tmp_path)
    assert validate(folder, DORA_LAYOUT) == []
    [problem] = validate(folder, LAYOUT)
    assert problem.code == Code.UNSUPPORTED_FEATURE
    assert "'use_dora' is True, expected unset" in str(problem)
    assert "--multilora-dora" in str(problem)


@pytest.mark.parametrize("modules", [[Q0], [m for m in MODULES if "up_proj" in m]], ids=len)
def test_some_modules_of_a_fused_layer_may_have_magnitudes(
    modules: list[str], tmp_path: Path
) -> None:
    assert validate(make_dora(good(modules)).write(tmp_path), DORA_LAYOUT) == []


def test_a_layer_that_cannot_be_multiplied_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = make_dora(good()).write(tmp_path / "dora")
    layout = replace(DORA_LAYOUT, no_dora={Q0: "its weights are quantised (Fp8LinearMethod)"})
    [problem] = validate(folder, layout)
    assert problem.code == Code.UNSUPPORTED_FEATURE
    assert Q0 in problem.where
    assert "its weights are quantised (Fp8LinearMethod)" in str(problem)
    assert validate(good().write(tmp_path / "plain"), layout) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_magnitudes_are_packed_in_float32_whatever_slots_are(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    draft = make_dora(good())
    requested = {m: draft.tensors[magnitude_of(m)].to(dtype) for m in MODULES}
    draft.tensors |= {magnitude_of(m): vector for m, vector in requested.items()}
    pack = take(draft.write(tmp_path), replace(DORA_LAYOUT, dtype=BFLOAT16))
    [index] = pack.index.ranks
    assert len(index.magnitude_places) == len(MODULES)
    for place, vector in zip(index.magnitude_places.tolist(), requested.values(), strict=True):
        assert torch.equal(pack.matrix(place, torch.float32, len(vector)), vector.float())


def test_each_rank_gets_its_outputs_magnitudes(tmp_path: Path) -> None:
    """With two workers, column-parallel layers are split and row-parallel ones are not."""
    draft = make_dora(good())
    folder = draft.write(tmp_path)

    def of_rank(rank: int):
        def part(whole):
            if "o_proj" in whole.name or "down_proj" in whole.name:
                half = whole.inputs // 2
                return replace(whole, input_range=(rank * half, (rank + 1) * half))
            half = whole.outputs // 2
            return replace(whole, output_range=(rank * half, (rank + 1) * half))

        return replace(DORA_LAYOUT, slices=tuple(map(part, DORA_LAYOUT.slices)))

    pack = take(folder, of_rank(0), of_rank(1))
    for rank, index in enumerate(pack.index.ranks):
        for part, place in zip(
            pack.layouts[rank].slices, index.magnitude_places.tolist(), strict=True
        ):
            first, last = part.output_range
            found = pack.matrix(place, torch.float32, last - first)
            assert torch.equal(found, draft.tensors[magnitude_of(part.name)][first:last])


def test_the_digest_covers_magnitudes_and_what_they_are_for(tmp_path: Path) -> None:
    def digest(name: str, draft) -> str:
        with open_adapter(str(draft.write(tmp_path / name)), Rules()) as source:
            return source.digest()

    changed = make_dora(good())
    changed.tensors[magnitude_of(Q0)][5] += 1e-3
    silent = make_dora(good())
    silent.config["use_dora"] = False
    drafts = {"plain": good(), "dora": make_dora(good()), "changed": changed, "silent": silent}
    assert len({digest(name, draft) for name, draft in drafts.items()}) == len(drafts)


def test_its_bytes_are_counted(tmp_path: Path) -> None:
    folder = make_dora(good(rank=DORA_LAYOUT.max_rank)).write(tmp_path)
    assert take(folder, DORA_LAYOUT).nbytes == DORA_LAYOUT.largest_bytes()
    magnitudes = sum(4 * outputs for _, outputs in MODULES.values())
    assert DORA_LAYOUT.largest_bytes() - LAYOUT.largest_bytes() == magnitudes
