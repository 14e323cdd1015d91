"""Takes an adapter in: opens its files once, checks them, and packs them in one pass.

    with open_adapter(path, rules) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

This runs in processes that hold nothing worth stealing: everything that a customer wrote is parsed
here, and nothing here needs PyTorch (except for pickles, if they are allowed).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from vllm_multilora.adapters.adapter_errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.checks.matching import TensorReport, check_tensors
from vllm_multilora.adapters.checks.problem_list import ProblemList
from vllm_multilora.adapters.checks.values import explain
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.config.config_checks import config_problems
from vllm_multilora.adapters.files.adapter_folder import (
    CONFIG_NAME,
    TENSORS_NAME,
    AdapterFolder,
    read_config,
)
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.files.one_pass import TensorPart, read_once
from vllm_multilora.adapters.files.pickled import as_safetensors, pickled_name
from vllm_multilora.adapters.files.regular_file import RegularFile, mostly_holes, too_large
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS, SizeLimits
from vllm_multilora.adapters.packing.applied import Applied, applied_of, judged
from vllm_multilora.adapters.packing.pack_plan import PackPlan, padded_sizes, write_index
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.adapters.signing.adapter_digest import AdapterDigest
from vllm_multilora.adapters.signing.signature import Hash
from vllm_multilora.adapters.signing.signed_files import SignedFiles
from vllm_multilora.adapters.signing.signers import Signers

_Ints = npt.NDArray[np.int64]

_ANY_SIZE = 1 << 62
_MISSING = {Code.FOLDER_MISSING, Code.FILE_MISSING}
_PASSING = {Code.FILE_UNREADABLE, Code.FILE_CHANGED}
# Of the configuration, what vLLM's own classes read for the layers that they fill. Ranks and
# scalings are worked out here: the processes that hold the model match no patterns.
_KEYS_OF_VLLM = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "bias")


@dataclass(frozen=True)
class Rules:
    """What a server allows of adapters.

    Attributes:
        allowed_roots: Folders below which they must lie, links resolved; none: anywhere.
        allow_pickle: Whether weights may come from `torch.save`.
        check_finite: Whether to refuse values that slots cannot hold.
        directories: Directories of adapters; see `AllowedRoots`.
        signers: Those by one of whom adapters must be signed, in safetensors format then; None:
            signatures are not looked at.
    """

    allowed_roots: tuple[str, ...] = ()
    allow_pickle: bool = False
    check_finite: bool = True
    directories: tuple[str, ...] = ()
    signers: Signers | None = None


@dataclass(frozen=True)
class IntakeResult:
    """An adapter that has been read.

    Attributes:
        digest: BLAKE3 of what is applied, 64 hexadecimal digits; see `digest.AdapterDigest`.
        nbytes: Bytes of its blocks, without what they are rounded up by.
        parts: The digests of a blend's parts; none for other adapters.
    """

    digest: str
    nbytes: int
    parts: tuple[str, ...] = ()


def open_adapter(path: str, rules: Rules, limits: SizeLimits = DEFAULT_LIMITS) -> AdapterSource:
    """Opens an adapter's files.

    Raises:
        AdapterNotFoundError: There is no such folder.
        AdapterFormatError: It, or one of its files, lies outside the allowed roots, or it is not
            signed and must be.
        AdapterReadError: It cannot be opened.
    """
    with ExitStack() as opened:
        folder = AdapterFolder(path, AllowedRoots(rules.allowed_roots, rules.directories))
        opened.callback(folder.close)
        is_pickle_allowed = rules.allow_pickle and rules.signers is None
        pickled = pickled_name(folder) if is_pickle_allowed else None
        config = _open(folder, CONFIG_NAME)
        if isinstance(config, RegularFile):
            opened.callback(config.close)
        weights = _open(folder, pickled or TENSORS_NAME)
        if isinstance(weights, RegularFile):
            opened.callback(weights.close)
        signed = None if rules.signers is None else SignedFiles(folder, rules.signers)
        opened.pop_all()
    if signed is None:
        folder.close()
    return AdapterSource(config, weights, rules, limits, signed, is_pickled=pickled is not None)


def _open(folder: AdapterFolder, name: str) -> RegularFile | AdapterError:
    """A file, or why it cannot be had: what is wrong with the other is to be said, too."""
    try:
        return folder.open(name)
    except AdapterError as error:
        if any(problem.code == Code.NOT_ALLOWED for problem in error.problems):
            raise
        return error


class AdapterSource:
    """An adapter's two files, opened once; a context manager that closes them.

    Attributes:
        version: Tells one state of the files from another.
    """

    def __init__(
        self,
        config: RegularFile | AdapterError,
        weights: RegularFile | AdapterError,
        rules: Rules,
        limits: SizeLimits,
        signed: SignedFiles | None = None,
        *,
        is_pickled: bool,
    ) -> None:
        self._config_file = config
        self._weights_file = weights
        self._rules = rules
        self._limits = limits
        self._is_pickled = is_pickled
        self._files = [file for file in (config, weights) if isinstance(file, RegularFile)]
        self.version = " ".join(
            str(file.fingerprint) if isinstance(file, RegularFile) else "-"
            for file in (config, weights)
        )
        self._signed = signed
        self._signed_config: bytes | None = None
        self._used: Hash | None = None  # takes in the weights' bytes as they are packed
        if signed is not None:
            self.version += f" {signed.version}"

    def verify(self) -> None:
        """Compares the files with their signature, where they must have one.

        Raises:
            AdapterError: It is not trusted, or they are not as it says; nothing of them has been
                parsed.
        """
        if self._signed is None:
            return
        config, weights = self._config_file, self._weights_file
        if isinstance(config, AdapterError) or isinstance(weights, AdapterError):
            errors = [file for file in (config, weights) if isinstance(file, AdapterError)]
            raise error_of(problem for error in errors for problem in error.problems)
        self._signed_config = read_config(config, self._limits)
        self._signed.verify(config, self._signed_config, weights)
        self._used = self._signed.new_hash()

    def check(self, layouts: Sequence[ModelLayout]) -> Intake:
        """Checks all but the weights' values.

        Args:
            layouts: What the workers of this machine accept, at least one; in the order of the
                ranks in the pack's index.

        Raises:
            AdapterError: The adapter cannot be served; its problems are all that is wrong, and
                here that includes values.
        """
        if not layouts:
            raise ValueError("an adapter is checked against at least one layout, found none")
        self.verify()
        kinds = LayoutKinds(layouts)
        problems: list[Problem] = []
        config = self._read_config(problems)
        if config is not None:
            for layout in kinds.layouts:
                problems += config_problems(config, str(_path(self._config_file)), layout)
        try:
            file = self._read_header(kinds.layouts)
            reports = self._check_tensors(file, config, kinds, problems)
            if not problems and config is not None:
                return self._intake(file, config, kinds, reports)
            if self._rules.check_finite and not _too_large_in(problems):
                # Refused anyway: then all that is wrong is said at once.
                applied = [applied_of(file, config, report) for report in reports]
                parts = judged(applied, kinds.layouts)
                problems += _bad_values(file, [parts[i] for i in read_once(file, parts)])
                for one in self._files:
                    one.require_unchanged()
        except AdapterError as error:
            problems += error.problems
        raise error_of(dict.fromkeys(problems))

    def config(self) -> AdapterConfig | None:
        """The adapter's configuration; None where it cannot be read, which `check` explains."""
        return self._read_config([])

    def digest(self) -> str:
        """The adapter's digest, of which no more is checked than it takes.

        Raises:
            AdapterError: A file is missing, or is not what its name promises.
        """
        self.verify()
        problems: list[Problem] = []
        config = self._read_config(problems)
        if config is None:
            raise error_of(problems)
        file = self._open_tensors(self._weights(lambda: _ANY_SIZE), self._limits)
        digest = AdapterDigest(config, file.tensors)
        read_once(file, (), show=self.shown_to(digest.update))
        self.require_unchanged()
        return digest.hexdigest()

    def _read_config(self, problems: list[Problem]) -> AdapterConfig | None:
        try:
            if isinstance(self._config_file, AdapterError):
                raise self._config_file
            content = self._signed_config
            if content is None:
                content = read_config(self._config_file, self._limits)
        except AdapterError as error:
            problems += error.problems
            return None
        config, found = AdapterConfig.read(content, str(self._config_file.path))
        problems += found
        return config

    def _read_header(self, layouts: Sequence[ModelLayout]) -> TensorFile:
        weights = self._weights(lambda: self._most_bytes(layouts))
        return self._open_tensors(weights, self._limits.for_layouts(layouts))

    def _open_tensors(self, weights: RegularFile, limits: SizeLimits) -> TensorFile:
        return TensorFile(weights, limits, None if self._used is None else self._used.update)

    def _weights(self, most_bytes: Callable[[], int]) -> RegularFile:
        """The tensors' file, in safetensors format; pickled ones take so many bytes at most."""
        file = self._weights_file
        if isinstance(file, AdapterError):
            raise file
        if self._is_pickled:
            file = as_safetensors(file, most_bytes())
            self._files.append(file)
        return file

    def _check_tensors(
        self,
        file: TensorFile,
        config: AdapterConfig | None,
        kinds: LayoutKinds,
        problems: list[Problem],
    ) -> list[TensorReport]:
        where = str(file.file.path)
        reports = [check_tensors(file.tensors, config, layout, where) for layout in kinds.layouts]
        for report in reports:
            problems += report.problems
        most = self._most_bytes(kinds.layouts)
        if file.end > most:
            problems.append(too_large(where, file.end, most))
        else:
            self._check_holes(file, kinds.layouts, problems)
        return reports

    def _check_holes(
        self, file: TensorFile, layouts: Sequence[ModelLayout], problems: list[Problem]
    ) -> None:
        most = sum(self._limits.most_known_bytes(layout) for layout in layouts)
        if file.end > most and (holes := file.file.hole_bytes()) > most:
            problems.append(mostly_holes(str(file.file.path), file.end, holes))

    def _most_bytes(self, layouts: Sequence[ModelLayout]) -> int:
        # Under pipeline parallelism each stage knows its own layers only.
        return sum(self._limits.most_bytes(layout) for layout in layouts)

    def _intake(
        self,
        file: TensorFile,
        config: AdapterConfig,
        kinds: LayoutKinds,
        reports: Sequence[TensorReport],
    ) -> Intake:
        applied = [
            applied_of(file, config, report, layout)
            for report, layout in zip(reports, kinds.layouts, strict=True)
        ]
        return Intake(
            self,
            file,
            config,
            PackPlan(
                file,
                kinds.all,
                [applied[kind] for kind in kinds.of],
                json.dumps({key: config.raw[key] for key in _KEYS_OF_VLLM if key in config.raw}),
            ),
            applied=[applied[kind] for kind in kinds.of],
            check_finite=self._rules.check_finite,
            rank=max(
                (config.rank_of(module.target) for report in reports for module in report.modules),
                default=config.rank,
            ),
        )

    def shown_to(self, show: Callable[[memoryview], object]) -> Callable[[memoryview], object]:
        """What the weights' bytes are to be shown to, for `show` to see them."""
        used = self._used
        if used is None:
            return show

        def show_both(content: memoryview) -> None:
            show(content)
            used.update(content)

        return show_both

    def require_unchanged(self) -> None:
        """Raises if the bytes that were used are not those that were opened, or are signed.

        Raises:
            AdapterReadError: A file was written to meanwhile.
        """
        for file in self._files:
            file.require_unchanged()
        if self._used is not None and isinstance(self._weights_file, RegularFile):
            assert self._signed is not None
            self._signed.require_same(self._weights_file, self._used)

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        for file in self._files:
            file.close()
        if self._signed is not None:
            self._signed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Intake:
    """A checked adapter that is to be read.

    Attributes:
        file: Its tensors.
        config: Its configuration.
        applied: What of it is applied, for each layout.
        rank: Its largest true rank.
        has_special: Whether it has tensors for layers that vLLM fills itself.
        invocation_tokens: From whose last occurrence in a prompt on it acts; none: on all of it.
        dora: Whether it is a DoRA adapter.
        block_bytes: int64 [n], bytes of each block of the pack, multiples of 64; the last block is
            the index.
    """

    def __init__(
        self,
        source: AdapterSource,
        file: TensorFile,
        config: AdapterConfig,
        plan: PackPlan,
        *,
        applied: Sequence[Applied],
        check_finite: bool,
        rank: int,
    ) -> None:
        self._source = source
        self.file = file
        self.config = config
        self.applied = applied
        self._plan = plan
        self._check_finite = check_finite
        self.rank = rank
        self.has_special = plan.has_raw
        self.invocation_tokens = config.invocation_tokens
        self.dora = config.dora
        self.block_bytes = padded_sizes(plan)

    def read(self, addresses: _Ints | None, places: _Ints | None) -> IntakeResult:
        """Reads the tensors once: judges and digests them, and packs them into memory.

        Args:
            addresses: int64 [n], where the blocks go in this process's memory, each with room for
                its `block_bytes`; None: nothing is packed.
            places: int64 [n], what the index says of where they lie; None if nothing is packed.

        Raises:
            AdapterFormatError: Values are not finite, or not once they are in a slot.
            AdapterReadError: The files were written to or truncated meanwhile, or cannot be read.
            ValueError: As many addresses and places as blocks are needed.
        """
        plan = self._plan
        targets = None
        if addresses is not None and places is not None:
            write_index(plan, addresses, places)
            targets = np.zeros(len(plan.parts), np.int64)
            targets[: plan.blocks] = addresses[: plan.blocks]
        return IntakeResult(self.read_parts(plan.parts, targets), int(plan.sizes.sum()))

    def read_parts(self, parts: Sequence[TensorPart], targets: _Ints | None) -> str:
        """Reads the tensors once: judges and digests them, and packs parts of them.

        Args:
            parts: What is to be packed or judged.
            targets: As `addresses` of `read_once`.

        Returns:
            The adapter's digest.

        Raises:
            AdapterError: As `read`.
        """
        digest = AdapterDigest(self.config, self.file.tensors)
        show = self._source.shown_to(digest.update)
        bad = read_once(self.file, parts, addresses=targets, show=show)
        self._source.require_unchanged()
        if bad and self._check_finite:
            raise AdapterFormatError.of(*_bad_values(self.file, [parts[i] for i in bad]))
        return digest.hexdigest()


def _bad_values(file: TensorFile, parts: Iterable[TensorPart]) -> list[Problem]:
    problems = ProblemList(str(file.file.path))
    explain(file, parts, problems)
    return problems.grouped()


def _too_large_in(problems: Iterable[Problem]) -> bool:
    return any(problem.code == Code.FILE_TOO_LARGE for problem in problems)


def _path(file: RegularFile | AdapterError) -> str:
    return str(file.path) if isinstance(file, RegularFile) else CONFIG_NAME


def error_of(problems: Iterable[Problem]) -> AdapterError:
    """The error of problems: of the kind that says whether to try again."""
    found = tuple(problems)
    codes = {problem.code for problem in found}
    if codes & _MISSING:
        return AdapterNotFoundError.of(*found)
    return (AdapterReadError if codes <= _PASSING else AdapterFormatError).of(*found)


class LayoutKinds:
    """Layouts that differ in what is checked: those of tensor-parallel ranks differ in ranges only.

    Attributes:
        all: Every layout.
        layouts: One of each kind.
        of: The kind of each layout, an index into `layouts`.
    """

    def __init__(self, layouts: Sequence[ModelLayout]) -> None:
        self.all = layouts
        self.layouts: list[ModelLayout] = []
        self.of: list[int] = []
        if len(layouts) == 1:
            self.layouts, self.of = [*layouts], [0]
            return
        kinds: list[ModelLayout] = []
        for layout in layouts:
            kind = _without_ranges(layout)
            if kind not in kinds:
                kinds.append(kind)
                self.layouts.append(layout)
            self.of.append(kinds.index(kind))


def _without_ranges(layout: ModelLayout) -> ModelLayout:
    sizes = sorted({(part.name, part.inputs, part.outputs) for part in layout.slices})
    slices = tuple(SliceLayout(name, 0, k, n, (0, k), (0, n)) for name, k, n in sizes)
    return replace(layout, slices=slices, columns_first=False)
