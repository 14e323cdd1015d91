"""Everything that is wrong with an adapter, found before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_multilora.adapters.checkpoint import AdapterCheckpoint
from vllm_multilora.adapters.config import AdapterConfig
from vllm_multilora.adapters.config_checks import config_problems
from vllm_multilora.adapters.errors import AdapterError
from vllm_multilora.adapters.finite import check_values
from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME, read_config
from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.adapters.limits import DEFAULT_LIMITS, Limits
from vllm_multilora.adapters.problem_list import ProblemList
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.adapters.shape_checks import WEIGHT_DTYPES
from vllm_multilora.adapters.tensor_checks import TensorReport, check_tensors
from vllm_multilora.adapters.tensor_file import TensorFile


def validate(
    source: str | Path | AdapterCheckpoint,
    layout: ModelLayout,
    *,
    check_finite: bool = True,
    limits: Limits = DEFAULT_LIMITS,
) -> list[Problem]:
    """Says all that is wrong with an adapter, one problem for each cause.

    Nothing is changed, executed or loaded: besides the configuration and the header, weights are
    only looked at, chunk by chunk.

    Args:
        source: The adapter's folder, or an open checkpoint.
        layout: What the base model accepts.
        check_finite: Whether to read the weights, for NaN, infinity and overflow.
        limits: How large the files may be.

    Returns:
        The problems; none if the adapter can be served.
    """
    if isinstance(source, AdapterCheckpoint):
        return _problems(source, source.config, source.path, layout, check_finite, limits)
    folder = Path(source)
    problems: list[Problem] = []
    config: AdapterConfig | None = None
    try:
        content = read_config(folder, limits)
        config, problems = AdapterConfig.read(content, str(folder / CONFIG_NAME))
    except AdapterError as error:
        problems += error.problems
    if any(problem.code == Code.FOLDER_MISSING for problem in problems):
        return problems
    try:
        with TensorFile(folder / TENSORS_NAME, limits) as file:
            return problems + _problems(file, config, folder, layout, check_finite, limits)
    except AdapterError as error:
        if config is not None:
            problems += config_problems(config, str(folder / CONFIG_NAME), layout)
        return problems + list(error.problems)


def _problems(
    file: TensorFile,
    config: AdapterConfig | None,
    folder: Path,
    layout: ModelLayout,
    check_finite: bool,
    limits: Limits,
) -> list[Problem]:
    problems: list[Problem] = []
    if config is not None:
        problems += config_problems(config, str(folder / CONFIG_NAME), layout)
    where = str(file.tensors_path)
    try:
        report = check_tensors(file.tensors, config, layout, where)
        problems += report.problems
        most = limits.most_bytes(layout)
        if file.fingerprint.size > most:
            problems.append(_too_large(where, file.fingerprint.size, most))
        elif check_finite:
            values = ProblemList(where)
            check_values(file, _factors(file, config, report), layout.dtype, values)
            problems += values.grouped()
        file.require_unchanged()
    except AdapterError as error:
        problems += error.problems
    return problems


def _factors(
    file: TensorFile, config: AdapterConfig | None, report: TensorReport
) -> Iterator[tuple[str, float]]:
    """The tensors that are going to be served, and what their values are multiplied by."""
    for module in report.modules:
        for part, tensor in module.tensors.items():
            if file.tensors[tensor].dtype in WEIGHT_DTYPES:
                yield tensor, config.scaling(module.module) if config and part == "B" else 1.0
    for head in report.heads:
        if file.tensors[head].dtype in WEIGHT_DTYPES:
            yield head, 1.0


def _too_large(file: str, size: int, most: int) -> Problem:
    return Problem.at(
        Code.FILE_TOO_LARGE,
        file,
        "",
        f"{size} bytes",
        f"at most {most}, more than the base model's largest adapter needs",
        verb="has",
    )
