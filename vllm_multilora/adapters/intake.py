"""Takes an adapter in: opens its files once, checks them, and packs them in one pass.

    with open_adapter(path, rules) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

This runs in processes that hold nothing worth stealing: everything that a customer wrote is parsed
here, and nothing here needs PyTorch (except for pickles, if they are allowed).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vllm_multilora.adapters.adapter_errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.checks.shape_checks import check_tensors
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
from vllm_multilora.adapters.files.regular_file import RegularFile, too_large
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS, SizeLimits
from vllm_multilora.adapters.packing.applied import Applied, applied_of, judged
from vllm_multilora.adapters.packing.pack_plan import PackPlan
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


class AdapterSource(ExitStack):
    """An adapter's two files, opened once; `version` tells one state of them from another."""

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
        super().__init__()
        self._config_file = config
        self._weights_file = weights
        self._rules = rules
        self._limits = limits
        self._is_pickled = is_pickled
        self._files = [file for file in (config, weights) if isinstance(file, RegularFile)]
        for file in self._files:
            self.callback(file.close)
        self.version = " ".join(
            str(file.fingerprint) if isinstance(file, RegularFile) else "-"
            for file in (config, weights)
        )
        self._signed = signed
        self._signed_config: bytes | None = None
        self._used: Hash | None = None  # takes in the weights' bytes as they are packed
        if signed is not None:
            self.version += f" {signed.version}"
            self.callback(signed.close)

    def verify(self) -> None:
        """Compares files that must be signed with the signature; raises `AdapterError`."""
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
        kinds, kind_of = _kinds(layouts)
        problems: list[Problem] = []
        config = self._read_config(problems)
        if config is not None and isinstance(self._config_file, RegularFile):
            for layout in kinds:
                problems += config_problems(config, str(self._config_file.path), layout)
        try:
            file = self._open_tensors(
                self._limits.for_layouts(kinds), lambda: self._most_bytes(kinds)
            )
            where = str(file.file.path)
            reports = [check_tensors(file.tensors, config, layout, where) for layout in kinds]
            for report in reports:
                problems += report.problems
            problems += self._size_problems(file, kinds)
            if not problems and config is not None:
                pairs = zip(reports, kinds, strict=True)
                applied = [applied_of(file, config, report, layout) for report, layout in pairs]
                return Intake(
                    self,
                    file,
                    config,
                    layouts,
                    applied=[applied[kind] for kind in kind_of],
                    check_finite=self._rules.check_finite,
                    rank=max(
                        (config.rank_of(module.target) for r in reports for module in r.modules),
                        default=config.rank,
                    ),
                )
            is_too_large = any(problem.code == Code.FILE_TOO_LARGE for problem in problems)
            if self._rules.check_finite and not is_too_large:
                # Refused anyway: then all that is wrong is said at once.
                applied = [applied_of(file, config, report) for report in reports]
                parts = judged(applied, kinds)
                problems += explain(file, [parts[i] for i in read_once(file, parts)])
                for one in self._files:
                    one.require_unchanged()
        except AdapterError as error:
            problems += error.problems
        raise error_of(dict.fromkeys(problems))

    def config(self) -> AdapterConfig | None:
        """The adapter's configuration; None where it cannot be read, which `check` explains."""
        return self._read_config([])

    def digest(self) -> str:
        """The adapter's digest; no more is checked than it takes; raises `AdapterError`."""
        self.verify()
        problems: list[Problem] = []
        config = self._read_config(problems)
        if config is None:
            raise error_of(problems)
        file = self._open_tensors(self._limits, lambda: _ANY_SIZE)
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

    def _open_tensors(self, limits: SizeLimits, most_bytes: Callable[[], int]) -> TensorFile:
        """Opens the tensors' file; pickled tensors take so many bytes at most."""
        file = self._weights_file
        if isinstance(file, AdapterError):
            raise file
        if self._is_pickled:
            file = as_safetensors(file, most_bytes())
            self.callback(file.close)
            self._files.append(file)
        return TensorFile(file, limits, None if self._used is None else self._used.update)

    def _size_problems(self, file: TensorFile, layouts: Sequence[ModelLayout]) -> Iterator[Problem]:
        """What is wrong with the tensors' file as a whole; it may be too large, or hold nothing."""
        where, size, most = str(file.file.path), file.end, self._most_bytes(layouts)
        most_known = sum(map(self._limits.most_known_bytes, layouts))
        if size > most:
            yield too_large(where, size, most)
        elif size > most_known and (holes := file.file.hole_bytes()) > most_known:
            yield Problem.at(
                Code.FILE_TOO_LARGE,
                where,
                "",
                f"{size} bytes of which {holes} are stored nowhere (a sparse file)",
                "an adapter's weights",
                verb="has",
                hint="copy or save the adapter again",
            )

    def _most_bytes(self, layouts: Sequence[ModelLayout]) -> int:
        # Under pipeline parallelism each stage knows its own layers only.
        return sum(self._limits.most_bytes(layout) for layout in layouts)

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
        """Raises `AdapterReadError` if bytes that were used are not those opened, or signed."""
        for file in self._files:
            file.require_unchanged()
        if self._used is not None and isinstance(self._weights_file, RegularFile):
            assert self._signed is not None
            self._signed.require_same(self._weights_file, self._used)


class Intake:
    """A checked adapter that is to be read.

    Attributes:
        applied: What of it is applied, for each layout.
        rank: Its largest true rank.
        has_special: Whether it has tensors for layers that vLLM fills itself.
        invocation_tokens: From whose last occurrence in a prompt on it acts; none: on all of it.
        block_bytes: int64 [n], bytes of each block of the pack, multiples of 64; the last block is
            the index.
    """

    def __init__(
        self,
        source: AdapterSource,
        file: TensorFile,
        config: AdapterConfig,
        layouts: Sequence[ModelLayout],
        *,
        applied: Sequence[Applied],
        check_finite: bool,
        rank: int,
    ) -> None:
        self._source = source
        self.file = file
        self.config = config
        self.applied = applied
        settings = {key: config.raw[key] for key in _KEYS_OF_VLLM if key in config.raw}
        self._plan = plan = PackPlan([file], layouts, [applied], json.dumps(settings))
        self._check_finite = check_finite
        self.rank = rank
        self.has_special = plan.has_raw
        self.invocation_tokens = config.invocation_tokens
        self.dora = config.dora
        self.block_bytes = plan.block_bytes

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
        if addresses is not None and places is not None:
            plan.write_index(addresses, places)
        digest = self.read_parts(plan.parts[0], plan.targets(0, addresses))
        return IntakeResult(digest, int(plan.sizes.sum()))

    def read_parts(self, parts: Sequence[TensorPart], targets: _Ints | None) -> str:
        """Reads the tensors; arguments as of `read_once`, errors of `read`; returns the digest."""
        digest = AdapterDigest(self.config, self.file.tensors)
        show = self._source.shown_to(digest.update)
        bad = read_once(self.file, parts, addresses=targets, show=show)
        self._source.require_unchanged()
        if bad and self._check_finite:
            raise AdapterFormatError.of(*explain(self.file, [parts[i] for i in bad]))
        return digest.hexdigest()


def error_of(problems: Iterable[Problem]) -> AdapterError:
    """The error of problems: of the kind that says whether to try again."""
    found = tuple(problems)
    codes = {problem.code for problem in found}
    if codes & _MISSING:
        return AdapterNotFoundError.of(*found)
    return (AdapterReadError if codes <= _PASSING else AdapterFormatError).of(*found)


def _kinds(layouts: Sequence[ModelLayout]) -> tuple[list[ModelLayout], list[int]]:
    """One layout of each kind, and the kind of each layout, an index into those.

    Kinds differ in what is checked: layouts of tensor-parallel ranks differ in ranges only.
    """
    if len(layouts) == 1:
        return [*layouts], [0]
    kinds: list[ModelLayout] = []
    found: list[ModelLayout] = []
    kind_of: list[int] = []
    for layout in layouts:
        kind = _without_ranges(layout)
        if kind not in kinds:
            kinds.append(kind)
            found.append(layout)
        kind_of.append(kinds.index(kind))
    return found, kind_of


def _without_ranges(layout: ModelLayout) -> ModelLayout:
    sizes = sorted({(part.name, part.inputs, part.outputs) for part in layout.slices})
    slices = tuple(SliceLayout(name, 0, k, n, (0, k), (0, n)) for name, k, n in sizes)
    return replace(layout, slices=slices, columns_first=False)
