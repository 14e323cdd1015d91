"""The signature of an adapter's folder, in the format of OpenSSF model signing, version 1.

`model.sig` is a Sigstore bundle in JSON around a DSSE envelope, whose payload is an in-toto
statement with the digest of every file: the manifest. The envelope is signed with a key, or with
the key of a certificate. https://github.com/sigstore/model-transparency and
https://github.com/secure-systems-lab/dsse

It is verified here and not by the package model-signing, because that package hashes files by their
paths, which may lead to other files by the time they are read; accepts a certificate as of the time
when it became valid, so that it never expires; and imports Sigstore's client.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from vllm_multilora.adapters.files.json_text import parse_json
from vllm_multilora.adapters.problems import shown
from vllm_multilora.adapters.signing.signers import Signers, UntrustedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_NAME = "model.sig"

MAX_FILES = 10_000
"""Files in a signed folder."""

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_MAX_PARTS, _MAX_VALUES = 2 * MAX_FILES, 8 * MAX_FILES
_MAX_CERTIFICATES = 8


class SignatureError(ValueError):
    """A signature cannot be trusted."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}, expected {expected}")
        self.found = found
        self.expected = expected


class Hash(Protocol):
    """Takes in bytes; one of hashlib's, or BLAKE3."""

    def update(self, content: memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


_HASHES: Mapping[str, Callable[[], Hash]] = {
    "sha256": hashlib.sha256,
    "blake2b": hashlib.blake2b,
    "blake3": blake3,
}


@dataclass(frozen=True)
class Manifest:
    """What a signature says of a folder.

    Attributes:
        files: Of each file, by its path in the folder, the digest and how it is computed.
        ignored: Paths of files, and of folders with all in them, that it says nothing of.
        allows_links: Whether files may be links.
    """

    files: Mapping[str, tuple[str, str]]
    ignored: frozenset[str]
    allows_links: bool

    def new_hash(self, name: str) -> Hash:
        return _HASHES[self.files[name][0]]()

    def is_ignored(self, name: str) -> bool:
        """Whether nothing is said of a file."""
        path = PurePosixPath(name)
        return any(str(one) in self.ignored for one in (path, *path.parents))


def read_manifest(content: bytes, signers: Signers, now: datetime) -> Manifest:
    """Reads a signature, and nothing of a manifest that is not signed; raises `SignatureError`."""
    bundle = _Json.of(content, "a signature")
    if bundle.text("mediaType") != _MEDIA_TYPE:
        raise SignatureError(
            f"a signature of the type {shown(bundle.text('mediaType'))}", f"{_MEDIA_TYPE!r}"
        )
    envelope = bundle.object("dsseEnvelope")
    payload, kind = envelope.base64("payload"), envelope.text("payloadType")
    if kind != _PAYLOAD_TYPE:
        raise SignatureError(f"a signature over {shown(kind)}", f"{_PAYLOAD_TYPE!r}")
    signatures = list(envelope.objects("signatures"))
    if len(signatures) != 1:
        raise SignatureError(f"{len(signatures)} signatures", "one")
    keys = _keys(bundle.object("verificationMaterial"), signers, now)
    _require_signed(payload, signatures[0].base64("sig"), keys, signers)
    return _manifest(_Json.of(payload, "a signed statement"))


def _keys(material: _Json, signers: Signers, now: datetime) -> list[EllipticCurvePublicKey]:
    if "x509CertificateChain" in material:
        chain = [
            one.base64("rawBytes")
            for one in material.object("x509CertificateChain").objects("certificates")
        ]
        if not 0 < len(chain) <= _MAX_CERTIFICATES:
            raise SignatureError(f"{len(chain)} certificates", f"1 to {_MAX_CERTIFICATES}")
        try:
            return [signers.key_of(chain, now)]
        except UntrustedError as error:
            raise SignatureError(
                f"signed with {error}", f"one that is valid now, and trusted by {signers}"
            ) from None
    if "publicKey" in material:
        hint = material.object("publicKey").text("hint", "")
        if keys := signers.keys_of(hint):
            return keys
        raise SignatureError(
            f"signed with the key {hint[:16]}..., which is not trusted here", _trusted(signers)
        )
    raise SignatureError(
        "signed without a key or a certificate chain of its own",
        "a signature by key or certificate: keyless ones can only be checked with Sigstore's "
        "service",
    )


def _require_signed(
    payload: bytes, signature: bytes, keys: list[EllipticCurvePublicKey], signers: Signers
) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    kinds = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    head = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} "
    signed = head.encode() + payload
    for key in keys:
        try:
            key.verify(signature, signed, ec.ECDSA(kinds[key.curve.key_size]))
        except InvalidSignature:
            continue
        return
    raise SignatureError("a signature that does not match its manifest", _trusted(signers))


def _manifest(statement: _Json) -> Manifest:
    kinds = statement.text("_type"), statement.text("predicateType")
    if kinds != (_STATEMENT, _PREDICATE):
        raise SignatureError(f"a manifest of the type {shown(kinds[1])}", f"{_PREDICATE!r}")
    predicate = statement.object("predicate")
    how = predicate.object("serialization")
    if how.text("method") != "files":
        raise SignatureError(
            f"a manifest by {shown(how.text('method'))}", "one by 'files': sign it so"
        )
    files: dict[str, tuple[str, str]] = {}
    everything = hashlib.sha256()
    for resource in predicate.objects("resources"):
        name, algorithm = resource.text("name"), resource.text("algorithm")
        digest = resource.text("digest")
        path = PurePosixPath(name)
        if name != str(path) or path.is_absolute() or {"..", "."} & {*path.parts} or not path.parts:
            raise SignatureError(f"a manifest with the path {shown(name)}", "paths in the folder")
        if name in files:
            raise SignatureError(f"a manifest that has {shown(name)} twice", "each file once")
        if algorithm not in _HASHES:
            raise SignatureError(f"a digest by {shown(algorithm)}", f"one by {', '.join(_HASHES)}")
        try:
            everything.update(bytes.fromhex(digest))
        except ValueError:
            raise SignatureError(f"the digest {shown(digest)}", "hexadecimal digits") from None
        files[name] = algorithm, digest
    roots = [one.object("digest").text("sha256") for one in statement.objects("subject")]
    if roots != [everything.hexdigest()]:
        raise SignatureError(
            "a manifest that does not match its subject", "the digest of all digests"
        )
    ignored = (path for path in how.value("ignore_paths", list, []) if isinstance(path, str))
    links = how.value("allow_symlinks", bool, False)
    return Manifest(files, frozenset(ignored), links)


def _trusted(signers: Signers) -> str:
    return f"a signature that is trusted here, by {signers}"


class _Json:
    """An object of a signature, whose values are looked at one by one."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise SignatureError(f"{what} that is {shown(value)}", "an object")
        self._value: dict[str, Any] = value
        self._what = what

    @classmethod
    def of(cls, content: bytes, what: str) -> _Json:
        try:
            value = parse_json(content, parts=_MAX_PARTS, values=_MAX_VALUES, unique=True)
        except ValueError as error:
            raise SignatureError(
                f"{what} that is not JSON ({error})", "a Sigstore bundle"
            ) from None
        return cls(value, what)

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._value.get(key, default)
        if not isinstance(value, kind):
            found = shown(value) if key in self._value else f"no {key!r}"
            raise SignatureError(f"{self._what} with {found}", f"{key!r} to be a {kind.__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        text: str = self.value(key, str, default)
        return text

    def base64(self, key: str) -> bytes:
        try:
            return base64.b64decode(self.text(key), validate=True)
        except ValueError:
            raise SignatureError(
                f"{self._what} with {key!r} that is not base64", "base64"
            ) from None

    def object(self, key: str) -> _Json:
        return _Json(self.value(key, dict), self._what)

    def objects(self, key: str) -> Iterator[_Json]:
        return (_Json(value, self._what) for value in self.value(key, list))
