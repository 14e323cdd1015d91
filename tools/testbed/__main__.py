"""Runs the smoke tests with the vLLM of this Python, and keeps the results if all of them pass.

    .venv-vllm-0.33/bin/python -m tools.testbed --runner 2

What is kept goes into results.json, docs/compatibility.md and the ledger. More arguments are
pytest's; with any, nothing is kept. `--resume` runs those that have not passed before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tools.testbed import compatibility, results

_CALLED = "MULTILORA_CALLED_PATCHES"  # as the recorder knows it
_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Runs the tests; returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.testbed", description=__doc__)
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1, help="vLLM's model runner")
    parser.add_argument("--resume", action="store_true", help="run what has not passed before")
    arguments, selection = parser.parse_known_args()
    vllm = version("vllm")
    run = ".".join(vllm.split(".")[:2]) + ("/2" if arguments.runner == 2 else "")
    folder = Path(sys.prefix, f"smoke-{arguments.runner}")
    outcomes, called = folder / "outcomes.json", folder / "called"
    before = json.loads(outcomes.read_text()) if arguments.resume else {}
    if not arguments.resume and not selection:
        shutil.rmtree(folder, ignore_errors=True)
    called.mkdir(parents=True, exist_ok=True)
    # With an equals sign: pytest takes other words that are paths for what it is to collect.
    command = [
        *(sys.executable, "-m", "pytest", "-m", "smoke", "-p", "tools.testbed.outcomes"),
        *([] if selection else [f"--outcomes={outcomes}"]),
        *([f"--passed={outcomes}"] if arguments.resume else []),
        *(selection or ["--numprocesses", "2", "--dist", "loadfile"]),
    ]
    environment = os.environ | _environment(arguments.runner) | {_CALLED: str(called)}
    status = subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode
    if selection or not outcomes.exists():
        return status
    found = before | json.loads(outcomes.read_text())
    outcomes.write_text(json.dumps(found))
    result = results.Result.of(vllm, found, (file.name for file in called.iterdir()))
    for test in result.failed:
        print(f"failed with vLLM {run}: {test}")
    if status == 0:
        results.keep(run, result)
        kept = results.load()
        compatibility.FILE.write_text(compatibility.page(kept))
        for table in results.SEAM_TABLES:
            table.write_text(results.with_checked(table.read_text(), kept))
    return status


def _environment(runner: int) -> dict[str, str]:
    """What has vLLM's CPU build choose a model runner.

    Raises:
        FileNotFoundError: This environment has no Triton backend for the second one.
    """
    if runner == 1:
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    backend = Path(sys.prefix) / "interpreter"
    if not backend.is_dir():
        raise FileNotFoundError(f"{backend} is missing: make_env.sh makes it")
    paths = [str(backend), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_CPU_CI_ENV": "1",  # no torch.compile, which would compile what the interpreter runs
        "PYTHONPATH": os.pathsep.join(paths),
    }


if __name__ == "__main__":
    sys.exit(main())
