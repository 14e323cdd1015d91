"""A calibration: what steps, requests and loads cost on one machine, as a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from vllm_multilora import __version__
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.patching.version import installed_version
from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.step_cost import TERMS

FORMAT = 3
_MIN_S = 1e-6
# Beyond these, other work on the machine was timed, too.
_MAX_SLOWDOWN, _MAX_SPREAD = 10.0, 0.5

# What a file's numbers must be; JSON has no NaN and no infinity.
_Cost = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class CalibrationError(MultiLoRAError, ValueError):
    """A calibration cannot be used, or cannot be made."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured: the processor and the system, as they call themselves."""

    processor: str
    cores: int
    system: str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the server that was measured, limits of its host memory, and its KV cache."""

    max_num_seqs: _Positive
    max_num_batched_tokens: _Positive
    max_model_len: _Positive
    max_loras: _Positive
    max_cpu_loras: _Positive | None = None
    cpu_cache_bytes: _Positive | None = None
    kv_tokens: _Count | None = None


class LoadCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What bringing an adapter into a slot takes: fixed seconds, and more for each MiB.

    A load takes `fixed_s` and `s_per_mib` of an idle engine, and those that begin with `beside` of
    one that computes all the time; a copy into a slot takes those that begin with `copy`.

    Attributes:
        source: Where the files were: `disk` or `page cache`.
        measured: Loads that were timed.
        spread: Root mean square of how far the timed loads are from these costs, relative to them.
    """

    fixed_s: _Cost
    s_per_mib: _Cost
    beside_fixed_s: _Cost
    beside_s_per_mib: _Cost
    copy_fixed_s: _Cost
    copy_s_per_mib: _Cost
    source: str
    measured: _Count
    spread: _Cost = 0.0

    def seconds(self, size: int, *, computing: bool) -> float:
        """Seconds of a load of so many bytes, while the engine computes or is idle."""
        if computing:
            return max(_MIN_S, self.beside_fixed_s + self.beside_s_per_mib * size / MIB)
        return max(_MIN_S, self.fixed_s + self.s_per_mib * size / MIB)

    def doubt(self, size: int) -> str:
        """Why the time of a load of so many bytes is hardly right; empty if nothing is odd."""
        idle, beside = self.seconds(size, computing=False), self.seconds(size, computing=True)
        found = []
        if beside > _MAX_SLOWDOWN * idle:
            found.append(
                f"a load of {size / MIB:,.1f} MiB would take {beside:.2f} s beside steps, and "
                f"{idle:.2f} s of an idle engine"
            )
        if self.spread > _MAX_SPREAD:
            found.append(f"timed loads are {self.spread:.0%} from what was fitted to them")
        return "; ".join(found)

    def copy_seconds(self, size: int) -> float:
        """Seconds of a copy of so many bytes into a slot."""
        return self.copy_fixed_s + self.copy_s_per_mib * size / MIB


class Residual(msgspec.Struct, frozen=True, kw_only=True):
    """How far the fitted time of a case's steps is from their measured mean, relative to it.

    Attributes:
        rms: The root mean square of all cases.
    """

    rms: float
    worst: float
    worst_case: str
    steps: int


class Ranges(msgspec.Struct, frozen=True, kw_only=True):
    """The most that was measured: of what steps have, as in `StepBatch`, and of a load's bytes."""

    prompt_tokens: int
    rows: int
    prompt_pairs: float
    context_tokens: int
    adapter_bytes: int
    load_bytes: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured, of which server, where.

    Attributes:
        created: In ISO 8601, UTC.
        versions: Of `vllm` and `vllm-multilora`.
        model: The names that the server has for its base model, and what it is loaded from.
        step_s: Seconds for one of each of `step_cost.TERMS`.
        request_s: Seconds of a request outside the engine, while that is idle.
        request_beside_s: As `request_s`, while the engine computes.
        loads: What loads take; None: no adapter was cold.
        adapters: Bytes of the adapters that were loaded, by name.
    """

    format: int
    created: str
    machine: Machine
    versions: dict[str, str]
    model: Annotated[list[str], msgspec.Meta(min_length=1)]
    settings: Settings
    step_s: dict[str, _Cost]
    request_s: _Cost
    request_beside_s: _Cost
    residual: Residual
    loads: LoadCosts | None
    ranges: Ranges
    adapters: dict[str, _Positive]


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before something is measured; leaves it as it is."""
    is_new = not path.exists()
    _write(path, b"", "ab")
    if is_new:
        path.unlink()


def write_calibration(calibration: Calibration, path: Path) -> None:
    _write(path, msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n", "wb")


def _write(path: Path, content: bytes, mode: str) -> None:
    try:
        with path.open(mode) as file:
            file.write(content)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be written: {error.strerror}") from error


def read_calibration(path: Path) -> Calibration:
    """Reads the file that `vllm-multilora calibrate` has written.

    Raises:
        CalibrationError: It cannot be read, or is none.
    """
    advice = "expected a file that `vllm-multilora calibrate` of this version has written"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CalibrationError(f"{path}: {error}; {advice}") from error
    if found.format != FORMAT:
        raise CalibrationError(f"{path}: has format {found.format}; {advice}")
    if set(found.step_s) != set(TERMS):
        raise CalibrationError(
            f"{path}: step_s has {', '.join(sorted(found.step_s)) or 'nothing'}; {advice}"
        )
    if not any(found.step_s.values()):
        raise CalibrationError(f"{path}: a step takes no time; {advice}")
    return found


def versions_here() -> dict[str, str]:
    """The versions of this package, and of vLLM where it is installed."""
    vllm = installed_version()
    return {"vllm-multilora": __version__} | ({} if vllm is None else {"vllm": vllm})


def check_fits(calibration: Calibration, path: Path, model: str | None) -> None:
    """Checks that a calibration speaks of this model, and of the versions that are here.

    The base model may be given by its name, or where it lies; None is whichever it is. vLLM need
    not be installed.

    Raises:
        CalibrationError: It speaks of others.
    """
    again = "calibrate a server with it again"
    names = {name.rstrip("/") for name in calibration.model}
    if model is not None and model.rstrip("/") not in names:
        raise CalibrationError(
            f"{path} was measured with the model {' alias '.join(calibration.model)}, but --model "
            f"is {model}; {again}"
        )
    for package, version in versions_here().items():
        found = calibration.versions.get(package, "unknown")
        if found.partition("+")[0] != version.partition("+")[0]:
            raise CalibrationError(
                f"{path} was measured with {package} {found}, but {version} is installed; {again}"
            )
