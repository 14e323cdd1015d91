"""Runs all parts one after the other, each in a process of its own, within a time limit.

    tools/gpu/run.sh FOLDER [--minutes 10] [--vllm FOLDER] [--dry-run | --rehearse]

Results are JSON files in FOLDER, one a part, and `summary.json`, which says what was run on which
card, what failed and what was left out for which reason. A part that its time is up for has failed
at nothing: what it has found until then counts. The folder for --vllm is made where vLLM is
installed, by `python -m tools.gpu.vllm_kernels`.

`--rehearse` runs the same parts without a card, with the kernels in Triton's interpreter and at
sizes at which that takes a minute or two: kernels are compiled for sm_90, cases are built, results
compared and files written as on a card. Nothing is measured, and the files say so: `"measured":
false`, and null for every figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_GRACE_S = 5.0  # for a part that ends by itself
_LOOK_S = 0.2

TOO_LATE = "too late"
"""In the place of a part's code where its time was up; no failure."""


@dataclass(frozen=True)
class Part:
    """A command.

    Attributes:
        name: Of its result.
        command: What is run, at the root of the checkout.
        share: Of the time, at most; what is left over goes to later parts.
        module: A Python module without which it is left out.
        program: A program without which it is left out.
        compiled: Whether kernels are compiled in a rehearsal, too, and not interpreted.
    """

    name: str
    command: tuple[str, ...]
    share: float
    module: str | None = None
    program: str | None = None
    compiled: bool = False

    @property
    def missing(self) -> str | None:
        """What it needs and this machine has not."""
        # A program of a module's name may belong to another Python.
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"module {self.module}"
        if self.program is not None and shutil.which(self.program) is None:
            return f"program {self.program}"
        return None


def parts(folder: Path, *, rehearsal: bool = False) -> Iterator[Part]:
    """All parts: compiling, then tests by what they tell, then times, then the slow sanitizer.

    Args:
        folder: For results.
        rehearsal: Whether to do without a card and what comes with one. Tests are only collected:
            without a card they run in the interpreter whenever they run.
    """

    def own(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"tools.gpu.{name}", *arguments)

    def out(name: str) -> tuple[str, str]:
        return "--out", str(folder / name)

    rehearse = ("--rehearse",) if rehearsal else ()
    yield Part("compile", own("compile", *out("compile.json"), *rehearse), 0.25, compiled=True)
    yield Part("stress", own("stress", *out("stress.json")), 0.2)
    tests = ("--collect-only",) if rehearsal else ("--out", str(folder))
    yield Part("tests", own("tests", *tests), 0.4, module="pytest")
    yield Part("times", own("times", *out("times.json"), *rehearse), 0.85)
    few = own("stress", "--replays=2")
    if rehearsal:
        yield Part("sanitizer", few, 1.0)
    else:
        sanitizer = ("compute-sanitizer", "--error-exitcode=9", *few)
        yield Part("sanitizer", sanitizer, 1.0, program="compute-sanitizer")


def run(
    folder: Path,
    seconds: float,
    vllm: Path | None,
    *,
    rehearsal: bool = False,
    ended: Sequence[int] = (),
) -> dict[str, Any]:
    """Runs the parts; returns the summary, which is also written.

    Args:
        folder: For results.
        seconds: For all of them.
        vllm: A folder with vLLM's kernels.
        rehearsal: As for `parts`.
        ended: Signals that have come meanwhile; with the first, the part that runs is the last.
    """
    end = time.monotonic() + seconds
    summary: dict[str, Any] = {"measured": not rehearsal, "seconds": seconds, "parts": {}}
    with tempfile.TemporaryDirectory() as paths:
        # Tests import the kernels by their name, which is not that of their folder.
        (Path(paths) / "multilora_kernels").symlink_to(ROOT / "kernels")
        path = [paths, str(ROOT), *([str(vllm.absolute())] if vllm else [])]
        # What the caller has put there, carried packages for example, comes last.
        path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        for part in parts(folder, rehearsal=rehearsal):
            if ended:
                break
            if part.missing:
                summary["parts"][part.name] = {"left_out": f"there is no {part.missing}"}
            else:
                begin = time.monotonic()
                limit = max(1.0, (end - begin) * part.share)
                given = {"PYTHONPATH": os.pathsep.join(path), "GPU_SECONDS": f"{limit:.0f}"}
                if rehearsal:
                    interpreted = "0" if part.compiled else "1"
                    given |= {"TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
                code = _run_part(part, folder, given, ended)
                took = time.monotonic() - begin
                summary["parts"][part.name] = {"code": code, "seconds": round(took, 1)}
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _can_be_interrupted() -> None:
    # What a shell starts in the background ignores interrupts, and so does all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run_part(
    part: Part, folder: Path, environment: dict[str, str], ended: Sequence[int]
) -> int | str:
    with (folder / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_can_be_interrupted,
        )
        end = time.monotonic() + float(environment["GPU_SECONDS"]) + _GRACE_S
        while not ended and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_S)
        # pytest writes down then how the tests went that it has run.
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        # With what it has started: the program under a sanitizer, say, would go on beside what is
        # timed next.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "ended" if ended else TOO_LATE


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; 1 if a part failed, 2 where there is no GPU. Too late is no failure."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu/run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for results")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--vllm", type=Path, help="a folder with vllm/, to be compared with")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would be run")
    how.add_argument(
        "--rehearse", action="store_true", help="run it without a card, measure nothing"
    )
    chosen = parser.parse_args(arguments)
    if chosen.dry_run:
        for part in parts(chosen.folder):
            missing = f" (left out: there is no {part.missing})" if part.missing else ""
            print(f"{part.name}{missing}: {' '.join(part.command)}")
        return 0
    if chosen.vllm is not None and not (chosen.vllm / "vllm" / "lora").is_dir():
        parser.error(f"{chosen.vllm} has no vLLM; python -m tools.gpu.vllm_kernels makes a folder")
    import torch

    if not chosen.rehearse and not torch.cuda.is_available():
        print(
            "PyTorch finds no GPU here; --dry-run says what would be run, --rehearse does it at "
            "tiny sizes in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    # Whoever ends this ends the part that runs, which has a session of its own.
    ended: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: ended.append(number))
    chosen.folder.mkdir(parents=True, exist_ok=True)
    summary = run(
        chosen.folder.absolute(),
        60 * chosen.minutes,
        chosen.vllm,
        rehearsal=chosen.rehearse,
        ended=ended,
    )
    print(json.dumps(summary, indent=1))
    if ended:
        return 128 + ended[0]
    codes = [part.get("code", 0) for part in summary["parts"].values()]
    return int(any(code not in (0, TOO_LATE) for code in codes))


if __name__ == "__main__":
    sys.exit(main())
