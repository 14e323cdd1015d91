"""A folder whose files must match its signature: all of them, in the bytes that are used."""

from __future__ import annotations

from datetime import UTC, datetime

from blake3 import blake3

from vllm_multilora.adapters.adapter_errors import AdapterFormatError, AdapterReadError
from vllm_multilora.adapters.files.adapter_folder import AdapterFolder
from vllm_multilora.adapters.files.regular_file import RENAME_HINT, RegularFile
from vllm_multilora.adapters.problems import Code, Problem, shown_name
from vllm_multilora.adapters.signing.signature import (
    MAX_FILES,
    SIGNATURE_NAME,
    Hash,
    Manifest,
    SignatureError,
    read_manifest,
)
from vllm_multilora.adapters.signing.signers import Signers

_MAX_BYTES = 4 << 20
_CHUNK = 1 << 20
_SIGN = "sign the folder again, with vllm-multilora sign or model_signing"


class SignedFiles:
    """An open folder and its signature.

    What is checked is what is used: files are read over the descriptors that they are used over,
    and the weights, which are read again when they are packed, are compared again.

    Attributes:
        version: Tells one state of the signature, and of those who may sign, from another.

    Raises:
        AdapterError: There is no signature.
    """

    def __init__(self, folder: AdapterFolder, signers: Signers) -> None:
        self._folder = folder
        self._signers = signers
        self._weights = ""  # the digest of those that were verified
        try:
            self._signature = folder.open(SIGNATURE_NAME)
        except FileNotFoundError:
            raise AdapterFormatError.at(
                Code.NOT_SIGNED,
                str(folder.path / SIGNATURE_NAME),
                "missing",
                f"a signature that is trusted here, by {signers}",
                hint=_SIGN,
            ) from None
        self.version = f"{self._signature.fingerprint} {signers.state}"

    def verify(self, config: RegularFile, content: bytes, weights: RegularFile) -> None:
        """Compares all files with the signature, before any is parsed; raises `AdapterError`."""
        manifest = self._read_manifest()
        used = {config.path.name: config, weights.path.name: weights}
        found, signed = self._names(manifest), manifest.files.keys()
        problems = [
            self._problem(name, what, expected)
            for names, what, expected in (
                (found - signed, "not in the signature", "only what is signed"),
                (signed - found, "missing", "all that is signed"),
                (used.keys() - signed - found, "not in the signature", "a digest of it"),
            )
            for name in sorted(names)
        ]
        for name in sorted(found & signed):
            file = used.get(name)
            found_hash = manifest.new_hash(name)
            if file is config:
                found_hash.update(memoryview(content))
            elif file is weights:
                again = self.new_hash()
                _take_in(weights, found_hash, again)
                self._weights = again.hexdigest()
            else:
                with self._folder.open(name) as other:
                    _take_in(other, found_hash)
            algorithm, digest = manifest.files[name]
            if (has := found_hash.hexdigest()) != digest.lower():
                expected = f"{digest}, as signed"
                problems.append(self._problem(name, f"{algorithm} {has}", expected, verb="has"))
        if problems:
            raise AdapterFormatError.of(*problems)

    def new_hash(self) -> Hash:
        """Takes in the verified weights once more, as they are used; faster than what is signed."""
        return blake3()

    def require_same(self, weights: RegularFile, used: Hash) -> None:
        """Raises `AdapterReadError` if bytes that were used are not those that were verified."""
        if used.hexdigest() == self._weights:
            return
        raise AdapterReadError.at(
            Code.FILE_CHANGED,
            str(weights.path),
            "written to while it was being read",
            "no change after its signature was verified",
            verb="was",
            hint=RENAME_HINT,
        )

    def close(self) -> None:
        """Closes the folder and the signature; closing twice is harmless."""
        self._signature.close()
        self._folder.close()

    def _read_manifest(self) -> Manifest:
        size = self._signature.fingerprint.size
        content = self._signature.read(min(size, _MAX_BYTES + 1))
        try:
            if len(content) > _MAX_BYTES:
                raise SignatureError(f"{size} bytes", f"at most {_MAX_BYTES}")
            return read_manifest(bytes(content), self._signers, datetime.now(UTC))
        except SignatureError as error:
            raise AdapterFormatError.at(
                Code.WRONG_SIGNATURE,
                str(self._signature.path),
                error.found,
                error.expected,
                verb="has",
                hint=_SIGN,
            ) from None

    def _names(self, manifest: Manifest) -> set[str]:
        """The files of the folder that the signature must have."""
        found: set[str] = set()
        for name, is_link in self._folder.files():
            if name not in manifest.files and (name == SIGNATURE_NAME or manifest.is_ignored(name)):
                continue
            if is_link and not manifest.allows_links:
                raise AdapterFormatError.of(
                    self._problem(name, "a link", "files: links were not signed")
                )
            found.add(name)
            if len(found) > MAX_FILES:
                raise AdapterFormatError.at(
                    Code.NOT_AS_SIGNED,
                    str(self._folder.path),
                    f"more than {MAX_FILES} files",
                    "an adapter",
                    verb="has",
                )
        return found

    def _problem(self, name: str, found: str, expected: str, verb: str = "is") -> Problem:
        path = f"{self._folder.path}/{shown_name(name)}"
        return Problem.at(Code.NOT_AS_SIGNED, path, "", found, expected, verb=verb, hint=_SIGN)


def _take_in(file: RegularFile, *into: Hash) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, file.fingerprint.size)))
    at = 0
    while at < file.fingerprint.size:
        piece = buffer[: min(len(buffer), file.fingerprint.size - at)]
        count = file.read_into(piece, at)
        if not count:
            break
        for each in into:
            each.update(piece[:count])
        at += count
