"""vLLM's kernels, carried to where it is not installed: they need nothing else of it, and work."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu import vllm_kernels
from tools.kernels.measure.agreement import TOLERANCES

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch
from tools.kernels.measure.agreement import Expected
from tools.kernels.measure.batches import BatchSpec, Layer, build
from tools.kernels.measure.contenders import load_contenders

errors, entered = {}, load_contenders()
layers = Layer("qkv", 64, (64, 32)), Layer("plain", 64, (48,))
for contender, layer in zip(entered.contenders, layers, strict=True):
    batch = build(BatchSpec(layer, 5, ranks=8, max_loras=2, max_rank=16), dtype=torch.float16)
    errors[contender.name] = Expected(batch).relative_error(contender.prepare(batch))
operators = ("vllm::lora_shrink", "vllm::lora_expand")
print(json.dumps({
    "errors": errors,
    "left out": entered.left_out,
    "on CUDA": [torch._C._dispatch_has_kernel_for_dispatch_key(o, "CUDA") for o in operators],
    "files": [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "vllm"],
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there they are compiled, not interpreted")
@pytest.mark.slow
def test_carried_kernels_need_nothing_else_of_vllm_and_are_right(tmp_path, capsys):
    assert vllm_kernels.main([str(tmp_path)]) == 0
    assert "KiB in " in capsys.readouterr().out
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) < 64 << 20
    paths = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["left out"] == []
    assert set(found["errors"]) == {"vllm", "vllm (specialized)"}
    assert max(found["errors"].values()) <= TOLERANCES[torch.float16]
    assert found["on CUDA"] == [True, True]
    assert len(found["files"]) > len(vllm_kernels.COPIED)
    assert all(Path(file).is_relative_to(tmp_path) for file in found["files"])


def test_a_function_that_vllm_no_longer_has_is_named(tmp_path, capsys):
    package = tmp_path / "vllm"
    for name in (*vllm_kernels.COPIED, *vllm_kernels.FUNCTIONS):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("import torch\n")
    assert vllm_kernels.main([str(tmp_path / "carried"), "--site", str(tmp_path)]) == 2
    assert "has no function get_captured_lora_counts" in capsys.readouterr().err
