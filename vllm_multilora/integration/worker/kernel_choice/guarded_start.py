"""The guarded start: no kernels serve on a card that have not been right there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multilora_kernels import triton_availability
from multilora_kernels.trial import records
from multilora_kernels.trial.cases import MAX_TIMING_SECONDS
from multilora_kernels.trial.choices import Choice, NoRightKernelError, choose
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.records import Record, RecordEntry
from multilora_kernels.trial.requests import NamedBackend, TrialRequest
from multilora_kernels.trial.supervisor import TrialError, run_trial
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.version import installed_version
from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper
from vllm_multilora.integration.step.punica_prepared import OURS, TORCH, VLLM, CallKey
from vllm_multilora.integration.worker.kernel_choice.layer_calls import layer_calls
from vllm_multilora.integration.worker.kernel_choice.reporting import (
    NOT_TRIED,
    report,
    report_unchosen,
)
from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)

ROWS = (1, 8, 32, 128, 512, 2048)
"""Row counts that are tried on a GPU: those of decoding, of mixed steps and of prefill."""
INTERPRETED_ROWS = (1, 17)
"""In Triton's interpreter, which takes milliseconds for each program."""
WAIT_SECONDS = 900.0
"""A worker waits so long for another one that tries the same kernels."""
MAX_LAYERS_NAMED = 4
"""Layers of a kind that the log and a record name."""

_TRIED = {
    "triton": NamedBackend("multilora_kernels.trial.trial_backends:triton"),
    "triton-invariant": NamedBackend("multilora_kernels.trial.trial_backends:invariant"),
    VLLM: NamedBackend("vllm_multilora.integration.step.stock_kernels:prepare", reads_rests=True),
    TORCH: NamedBackend("multilora_kernels.trial.trial_backends:torch_products"),
}


@dataclass(frozen=True)
class StartSettings:
    """How kernels are to be chosen."""

    kernels: str
    dtype: torch.dtype
    vllm_is_invariant: bool = False


@dataclass(frozen=True)
class _Call:
    """One call of one layer."""

    name: str
    layer: Any
    key: CallKey


def choose_kernels(
    layers: Mapping[str, Any], backend: str, settings: StartSettings
) -> Record | None:
    """Decides which kernels serve each layer, and has the layers' wrappers use them.

    Where there is no GPU, PyTorch's products stand for vLLM's kernels, which cannot run.

    Args:
        layers: LoRA layers by name, each ranked one with a wrapper of its own.
        backend: Our kernels' backend. Only those of GPUs, `triton` and `triton-invariant`, have
            others to choose from.
        settings: How to choose.

    Returns:
        What was decided, by kind of layer; None where nothing was: ours serve unchecked.

    Raises:
        ConfigError: No kernels that may serve are right on this card.
    """
    if backend not in ("triton", "triton-invariant") or settings.kernels == OURS:
        return None
    calls = _calls_by_kind(layers, settings.dtype)
    if not calls:
        return None
    wrapper: MultiLoRAPunicaWrapper = next(iter(calls.values()))[0].layer.punica_wrapper
    device = torch.device(wrapper.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stock = VLLM if device.type == "cuda" else TORCH
    if settings.kernels == VLLM:
        kinds = list(calls)
        choices = [Choice.always(stock)] * len(kinds)
        record = Record({"card": card_name(device)}, _entries(calls, choices))
    else:
        most = wrapper.plan.layout.max_tokens
        record = _tried(calls, device, most, backend, stock)
    for (kind, of_kind), entry in zip(calls.items(), record.entries, strict=True):
        _refuse_what_cannot_serve(kind, of_kind, entry, backend, settings)
    _install(calls, record)
    report(record, card_name(device))
    report_unchosen(layers.values(), card_name(device))
    return record


def _calls_by_kind(layers: Mapping[str, Any], dtype: torch.dtype) -> dict[LayerKind, list[_Call]]:
    found: dict[LayerKind, list[_Call]] = {}
    for name, layer in layers.items():
        for key, kind in layer_calls(layer, dtype):
            found.setdefault(kind, []).append(_Call(name, layer, key))
    return found


def _tried(
    calls: Mapping[LayerKind, Sequence[_Call]],
    device: torch.device,
    max_tokens: int,
    backend: str,
    stock: str,
) -> Record:
    """The record of these kernels on this card: one that is kept, or a new one."""
    facts = trial_facts(device, max_tokens=max_tokens, backend=backend)
    folder = records.default_folder()
    if folder is None:
        return _new_record(calls, device, max_tokens, backend, stock, facts)
    path = records.path_of(folder, facts, [kind.as_json() for kind in calls])
    with records.one_at_a_time(path, WAIT_SECONDS):
        known = records.load(path)
        if known is not None:
            logger.info("LoRA kernels were checked here before: %s", path)
            return known
        record = _new_record(calls, device, max_tokens, backend, stock, facts)
        if record.written:
            try:
                records.save(path, record)
            except OSError as error:
                logger.warning("The next start will check the LoRA kernels again: %s", error)
    return record


def _new_record(
    calls: Mapping[LayerKind, Sequence[_Call]],
    device: torch.device,
    max_tokens: int,
    backend: str,
    stock: str,
    facts: Mapping[str, str],
) -> Record:
    """Tries the kernels; `written` is 0 where they could not be tried."""
    rows = ROWS if device.type == "cuda" else INTERPRETED_ROWS
    fitting = tuple(count for count in rows if count <= max_tokens) or (1,)
    is_invariant = backend == "triton-invariant"
    begin = time.monotonic()
    # Kernels that change with the number of rows are not batch-invariant.
    is_timed = device.type == "cuda" and not is_invariant
    request = TrialRequest(
        tuple(calls),
        fitting,
        {OURS: _TRIED[backend], stock: _TRIED[stock]},
        str(device),
        max_tokens,
        MAX_TIMING_SECONDS if is_timed else 0.0,
    )
    try:
        ended = run_trial(request)
    except TrialError as error:
        logger.warning(
            "The LoRA kernels could not be tried on %s: %s. They are not used; "
            "--multilora-kernels ours uses them unchecked.",
            card_name(device),
            error,
        )
        unchecked = Choice(((None, stock),), {OURS: NOT_TRIED})
        return Record(facts, _entries(calls, [unchecked] * len(calls)))
    choices = []
    for place, kind in enumerate(calls):
        try:
            choices.append(choose(place, kind.describe(), ended, OURS, stock))
        except NoRightKernelError as error:
            raise ConfigError(
                f"{error}. --no-multilora leaves LoRA to vLLM; --multilora-kernels ours serves "
                f"without checks"
            ) from error
    logger.info("Tried the LoRA kernels in %.1f s.", time.monotonic() - begin)
    late = sum(not each.problem and each.seconds is None for each in ended)
    if is_timed and late:
        logger.warning(
            "%s of %d were right and could not be timed within %.0f s: ours serve there.",
            counted(late, "case"),
            len(ended),
            MAX_TIMING_SECONDS,
        )
    return Record(facts, _entries(calls, choices), written=time.time())


def _entries(
    calls: Mapping[LayerKind, Sequence[_Call]], choices: Iterable[Choice]
) -> tuple[RecordEntry, ...]:
    return tuple(
        # The last parts of layers' names, such as `qkv_proj`, each once.
        RecordEntry(
            kind.describe(),
            tuple(dict.fromkeys(c.name.rpartition(".")[2] for c in of_kind))[:MAX_LAYERS_NAMED],
            choice,
        )
        for (kind, of_kind), choice in zip(calls.items(), choices, strict=True)
    )


def _refuse_what_cannot_serve(
    kind: LayerKind,
    calls: Sequence[_Call],
    entry: RecordEntry,
    backend: str,
    settings: StartSettings,
) -> None:
    """Raises where the chosen kernels lack what the settings ask for."""
    if entry.choice.backends <= {OURS}:
        return
    needs = []
    if VLLM in entry.choice.backends and any(
        call.layer.punica_wrapper.factors is not None for call in calls
    ):
        needs.append("--multilora-dora")
    if backend == "triton-invariant" and not settings.vllm_is_invariant:
        needs.append("--multilora-batch-invariant")
    if needs:
        problem = entry.choice.problems.get(OURS, "they were not asked for")
        raise ConfigError(
            f"{' and '.join(needs)} cannot be had for layers of the kind {kind.describe()}: our "
            f"kernels do not serve there ({problem}). Leave {' and '.join(needs)} out, or use "
            f"--multilora-kernels ours"
        )


def _install(calls: Mapping[LayerKind, Sequence[_Call]], record: Record) -> None:
    by_layer: dict[int, tuple[Any, dict[CallKey, Choice]]] = {}
    for of_kind, entry in zip(calls.values(), record.entries, strict=True):
        for call in of_kind:
            _, choices = by_layer.setdefault(id(call.layer), (call.layer, {}))
            known = choices.get(call.key)
            choices[call.key] = entry.choice if known is None else _both(known, entry.choice)
    for layer, choices in by_layer.values():
        others = {key: each for key, each in choices.items() if each.backends != {OURS}}
        if others:
            layer.punica_wrapper.take_kernels(others)
            if layer.punica_wrapper.reads_rests:
                layer.punica_wrapper.read_slot_runs()


def _both(one: Choice, other: Choice) -> Choice:
    """The kernels of a call whose rows may have two types: right for both, whatever is faster."""
    if one.ranges == other.ranges:
        return one
    if OURS not in one.problems and OURS not in other.problems:
        return Choice.always(OURS)
    [stock] = (one.backends | other.backends) - {OURS}
    return Choice.always(stock)


_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
_VARIABLES = (
    "TRITON_INTERPRET",
    "VLLM_BATCH_INVARIANT",
    "VLLM_LORA_DISABLE_PDL",
    "VLLM_LORA_ENABLE_DUAL_STREAM",
    "VLLM_TUNED_CONFIG_FOLDER",
)
"""Environment variables that change which kernels run, or how."""


def trial_facts(device: torch.device, *, max_tokens: int, backend: str) -> dict[str, str]:
    """The facts by name; a choice is used again only where all of them are the same."""
    facts = {
        "card": card_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _triton(),
        "vLLM": str(installed_version()),
        "kernels": backend,
        "rows": str(max_tokens),
    }
    if device.type == "cuda":
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def card_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "Triton's interpreter"
    return torch.cuda.get_device_name(device)


def _driver() -> str:
    for path in map(Path, _DRIVERS):
        if path.is_file():
            return path.read_text().partition("\n")[0]
    return "unknown"


def _triton() -> str:
    if not triton_availability.is_installed():
        return "none"
    import triton

    return str(triton.__version__)
