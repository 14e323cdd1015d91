"""Who may sign adapters: the public keys and certificates in a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import ConfigError
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.x509 import Certificate

KEY, CERTIFICATE = "PUBLIC KEY", "CERTIFICATE"

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_EXPECTED = (
    f"one or more blocks of PEM, each a {KEY} on the curve P-256, P-384 or P-521, or a "
    f"{CERTIFICATE}"
)
_MAX_DEPTH = 8


class UntrustedError(ValueError):
    """A certificate is not to be trusted; the message says why."""


@dataclass(frozen=True)
class Signers:
    """Public keys and certificates, which sign or issue such; `state` tells files apart."""

    keys: tuple[EllipticCurvePublicKey, ...]
    anchors: tuple[Certificate, ...]
    state: str

    @classmethod
    def read(cls, path: str | Path) -> Signers:
        """Reads a file of PEM blocks; what is between them does not matter.

        Raises:
            ConfigError: It cannot be read, holds something else or nothing, or what it takes is
                not installed.
        """
        load_cryptography()
        from cryptography import exceptions, x509
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            content = Path(path).read_bytes()
            text = content.decode("ascii", "replace")
        except OSError as error:
            reason = f"cannot be read: {error.strerror}, expected {_EXPECTED}"
            raise ConfigError(f"{path}: {reason}") from error
        keys: list[Any] = []
        anchors = []
        for block in _BLOCK.finditer(text):
            kind, pem = block[1], block[0].encode()
            try:
                if kind == KEY:
                    keys.append(load_pem_public_key(pem))
                    if not is_signing_key(keys[-1]):
                        raise ValueError("a key of another kind")
                elif kind == CERTIFICATE:
                    anchors.append(x509.load_pem_x509_certificate(pem))
                else:
                    raise ValueError("neither a public key nor a certificate")
            except (ValueError, exceptions.UnsupportedAlgorithm) as error:
                raise ConfigError(
                    f"{path}: has a {kind} that cannot be used ({error}), expected {_EXPECTED}"
                ) from error
        if not keys and not anchors:
            raise ConfigError(f"{path}: has no key, expected {_EXPECTED}")
        return cls(tuple(keys), tuple(anchors), hashlib.sha256(content).hexdigest())

    def __str__(self) -> str:
        counts = (len(self.keys), "key"), (len(self.anchors), "certificate")
        return " and ".join(counted(n, what) for n, what in counts if n)

    def keys_of(self, hint: str) -> list[EllipticCurvePublicKey]:
        """The keys that a signature's hint may mean; all, where it is empty."""
        return [key for key in self.keys if not hint or hint == hint_of(key)]

    def key_of(self, chain: Sequence[bytes], now: datetime) -> EllipticCurvePublicKey:
        """The key of a certificate that may sign now.

        A signature has no time that anybody vouches for, so that the certificate, and those that
        vouch for it, must be valid when the signature is looked at.

        Args:
            chain: Certificates in DER: the one that signs, then those that lead to an anchor.
            now: The time.

        Raises:
            UntrustedError: It may not.
        """
        from cryptography import exceptions, x509

        try:
            leaf, *others = (x509.load_der_x509_certificate(one) for one in chain)
            name, key, may_sign = leaf.subject.rfc4514_string(), leaf.public_key(), _may_sign(leaf)
        except (
            ValueError,
            exceptions.UnsupportedAlgorithm,
            x509.DuplicateExtension,
            x509.InvalidVersion,
            x509.UnsupportedGeneralNameType,
        ) as error:
            raise UntrustedError(f"a certificate that cannot be read ({error})") from None
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            raise UntrustedError(
                f"the certificate {name!r}, valid from {_time(leaf.not_valid_before_utc)} to "
                f"{_time(leaf.not_valid_after_utc)}"
            )
        if not is_signing_key(key) or not may_sign:
            raise UntrustedError(f"the certificate {name!r}, which is not for signing")
        if leaf not in self.anchors:
            try:
                self._verify(leaf, others, now)
            except (ValueError, x509.verification.VerificationError) as error:
                raise UntrustedError(f"the certificate {name!r}, not trusted ({error})") from None
        return key  # type: ignore[return-value]

    def _verify(self, leaf: Certificate, others: list[Certificate], now: datetime) -> None:
        """Finds a way from a certificate to an anchor."""
        from cryptography.x509 import BasicConstraints, KeyUsage, verification

        if not self.anchors:
            raise ValueError("only keys are trusted here, not certificates")
        policy, criticality = verification.ExtensionPolicy, verification.Criticality.AGNOSTIC
        authorities = (
            policy.permit_all()
            .require_present(BasicConstraints, criticality, _is_authority)
            .may_be_present(KeyUsage, criticality, _may_issue)
        )
        verifier = (
            verification.PolicyBuilder()
            .store(verification.Store(list(self.anchors)))
            .time(now)
            .max_chain_depth(_MAX_DEPTH)
            .extension_policies(ca_policy=authorities, ee_policy=policy.permit_all())
            .build_client_verifier()
        )
        verifier.verify(leaf, others)


def load_cryptography() -> None:
    """Imports all that checking a signature takes, while a process may; raises `ConfigError`."""
    try:
        import cryptography.hazmat.backends.openssl
        import cryptography.x509.verification  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "signatures of adapters need the package cryptography: install vllm-multilora[signing]"
        ) from error


def is_signing_key(key: object) -> bool:
    from cryptography.hazmat.primitives.asymmetric import ec

    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES


def hint_of(key: EllipticCurvePublicKey) -> str:
    """What a signature calls the key that belongs to it: SHA-256 of its PEM."""
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def _may_sign(certificate: Certificate) -> bool:
    from cryptography import x509

    values: list[Any] = [extension.value for extension in certificate.extensions]
    return any(
        (isinstance(value, x509.KeyUsage) and value.digital_signature)
        or (
            isinstance(value, x509.ExtendedKeyUsage)
            and x509.oid.ExtendedKeyUsageOID.CODE_SIGNING in value
        )
        for value in values
    )


def _is_authority(policy: object, certificate: object, extension: Any) -> None:
    if not extension.ca:
        raise ValueError("it is issued by a certificate that is not an authority")


def _may_issue(policy: object, certificate: object, extension: Any) -> None:
    if extension is not None and not extension.key_cert_sign:
        raise ValueError("it is issued by a certificate that may issue none")


def _time(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
