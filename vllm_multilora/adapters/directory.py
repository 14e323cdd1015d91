"""Directories whose sub-folders are adapters: what is in them, and what has changed.

Nothing is opened here. A folder is an adapter if it has an `adapter_config.json`, and its versions
are told apart by the fingerprints of its two files, so that looking at thousands of folders takes
milliseconds.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, PICKLED_NAMES, TENSORS_NAME
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.files.regular_file import Fingerprint
from vllm_multilora.adapters.served_names import name_fault
from vllm_multilora.errors import ConfigError

logger = logging.getLogger(__name__)

FIRST_NUMBER = 1 << 32
"""Numbers of adapters from directories begin here, far above those that servers count up to."""

MAX_FOLDERS = 65_536
"""Folders of a directory that are looked at: as many adapters as an engine can know."""

_MAX_REPORTED = 1_000  # of `_TELL_AGAIN_S`; names, and what is wrong, may be a stranger's
_TELL_AGAIN_S = 86_400.0
_NUMBERS_END = 1 << 53  # what JSON's readers take for whole numbers


@dataclass(frozen=True)
class AdapterVersion:
    """One version of an adapter in a directory, by its files; `weights` may be there later."""

    name: str
    path: str
    config: Fingerprint
    weights: Fingerprint | None

    @property
    def number(self) -> int:
        """The version's number (`lora_int_id`).

        Servers that look at the same folder for themselves come to the same number without
        asking each other, and a new version gets a new one. Of 5,000 adapters, two share a number
        by chance with a probability of 1 to 700 million; who may write to a directory can look for
        two that do. So `AdapterDirectories` lets no two folders have one number.
        """
        digest = hashlib.blake2b(repr(self).encode(errors="surrogatepass"), digest_size=8).digest()
        return FIRST_NUMBER + int.from_bytes(digest) % (_NUMBERS_END - FIRST_NUMBER)


def require_directories(directories: Sequence[str]) -> None:
    """Checks a starting server's directories; raises `ConfigError` if one cannot be read."""
    for directory in directories:
        try:
            os.scandir(directory).close()
        except OSError as error:
            raise ConfigError(
                f"--multilora-adapter-dir names {directory!r}, which is not a directory that the "
                f"server can read ({error.strerror}): create it, or correct the flag"
            ) from error


def is_adapter_name(name: str) -> bool:
    """Whether a folder of this name may be an adapter: one visible, printable path component."""
    return bool(name) and name[0] != "." and "/" not in name and name_fault(name) is None


class AdapterDirectories:
    """Looks at directories, in the order given: of two folders of one name the first counts.

    A link may lead to anywhere below the directories, or below the allowed roots. What cannot be
    read for a while, directory or folder, counts as unchanged.
    """

    def __init__(
        self,
        directories: Sequence[str],
        allowed: AllowedRoots,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Real paths, so that several processes, and links to a directory, make no difference.
        self._directories = tuple(dict.fromkeys(map(os.path.realpath, directories)))
        self._allowed = allowed
        self._found: dict[str, dict[str, AdapterVersion]] = {d: {} for d in self._directories}
        self._clock = clock
        self._overfull: set[str] = set()  # those with folders that are not looked at
        self._reported: set[str] = set()
        self._reported_since = clock()
        # Whose numbers were given out at the last look at everything, and at the one before: a
        # version counts for as long as another one is being written.
        self._owners: dict[int, str] = {}
        self._owners_before: dict[int, str] = {}

    def scan(self) -> dict[str, AdapterVersion]:
        """Every adapter, by name."""
        adapters: dict[str, AdapterVersion] = {}
        self._owners_before, self._owners = self._owners, {}
        for directory in self._directories:
            try:
                self._found[directory] = self._scan(directory)
            except OSError as error:
                self.tell(f"{directory} cannot be read ({error.strerror}); its adapters stay")
            for name, folder in self._found[directory].items():
                if adapters.setdefault(name, folder) is not folder:
                    self.tell(f"{folder.path} is not served: {adapters[name].path} has its name")
        return {name: folder for name, folder in adapters.items() if self._has_own_number(folder)}

    def find(self, name: str) -> AdapterVersion | None:
        """One adapter, looked at now."""
        if not is_adapter_name(name):
            return None
        for directory in self._directories:
            if directory in self._overfull and name not in self._found[directory]:
                continue  # else it would come with each request, and go with each scan
            path = f"{directory}/{name}"
            # os.path, which takes a name that the file system cannot hold for one that is not there
            folder = self._look(directory, name, path, is_link=os.path.islink(path))  # noqa: PTH114
            if folder is not None:
                return folder if self._has_own_number(folder) else None
        return None

    def _scan(self, directory: str) -> dict[str, AdapterVersion]:
        found: dict[str, AdapterVersion] = {}
        with os.scandir(directory) as entries:
            for entry in islice(entries, MAX_FOLDERS):
                if is_adapter_name(entry.name):
                    folder = self._look(
                        directory, entry.name, entry.path, is_link=entry.is_symlink()
                    )
                    if folder is not None:
                        found[entry.name] = folder
            if next(entries, None) is None:
                self._overfull.discard(directory)
            else:
                self._overfull.add(directory)
                self.tell(f"{directory} has more than {MAX_FOLDERS} entries; not all are served")
        return dict(sorted(found.items()))

    def _look(
        self, directory: str, name: str, path: str, *, is_link: bool
    ) -> AdapterVersion | None:
        if is_link and not self._allowed.allows(path):
            self.tell(f"{path} is not served: it leads out of the folders adapters may come from")
            return None
        try:
            config = _fingerprint(path, CONFIG_NAME)
            if config is None:
                return None
            tensors = (_fingerprint(path, weights) for weights in (TENSORS_NAME, *PICKLED_NAMES))
            weights = next((tensor for tensor in tensors if tensor is not None), None)
        except OSError as error:
            self.tell(f"{path} cannot be read ({error.strerror})")
            return self._found[directory].get(name)
        return AdapterVersion(name, path, config, weights)

    def _has_own_number(self, folder: AdapterVersion) -> bool:
        """Whether no other folder has a folder's number; that number is its own from now on."""
        owner = self._owners.get(folder.number) or self._owners_before.get(folder.number)
        if owner is not None and owner != folder.path:
            self.tell(
                f"{folder.path} is not served: this version of it and {owner} have the same "
                f"number, {folder.number}; touch its {CONFIG_NAME} to give it another"
            )
            return False
        self._owners[folder.number] = folder.path
        return True

    def tell(self, what: str) -> None:
        """Logs what is wrong, once a day while it is; of very many things in a day the first."""
        if (now := self._clock()) - self._reported_since >= _TELL_AGAIN_S:
            self._reported, self._reported_since = set(), now
        if what not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add(what)
            logger.warning("Adapter directories: %s", what)


def _fingerprint(folder: str, name: str) -> Fingerprint | None:
    try:
        return Fingerprint.of(os.stat(f"{folder}/{name}"))  # noqa: PTH116 (twice as fast)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of the name, or of the whole path
            return None
        raise


class Settling:
    """Tells what has come to rest from what is being written.

    A new adapter counts at once. Another version of it, or its absence, counts when two looks in
    a row have seen the same: files that are still being copied, and a folder that is taken away to
    be put back, replace nothing.
    """

    def __init__(self) -> None:
        self._last: Mapping[str, AdapterVersion] = {}
        self._settled: dict[str, AdapterVersion] = {}

    def settle(self, found: Mapping[str, AdapterVersion]) -> dict[str, AdapterVersion]:
        """The adapters that count, from what the newest look has found."""
        settled = {
            name: folder if folder == self._last.get(name) else self._settled.get(name, folder)
            for name, folder in found.items()
        }
        for name in self._settled.keys() - found.keys():
            if name in self._last:
                settled[name] = self._settled[name]
        self._last, self._settled = found, settled
        return settled
