"""Keys and certificates for the tests, and folders signed with them."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vllm_multilora.cli import main

DAY = timedelta(days=1)


@dataclass(frozen=True)
class KeyPair:
    """A private key in a file, and the public one."""

    private: Path
    public: Path
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> "KeyPair":
        key = ec.generate_private_key(curve or ec.SECP256R1())
        private, public = folder / f"{name}.key", folder / f"{name}.pub"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        return cls(private, public, key)

    def sign(self, folder: Path, *options: object) -> Path:
        """Signs a folder with the command, which is OpenSSF's own code; returns the folder."""
        assert main(["sign", str(folder), "--key", str(self.private), *map(str, options)]) == 0
        return folder


def certify(
    path: Path,
    key: KeyPair,
    issuer: tuple[KeyPair, x509.Certificate] | None = None,
    *,
    is_authority: bool = False,
    begins: timedelta = -DAY,
    ends: timedelta = DAY,
    may_sign: bool = True,
) -> x509.Certificate:
    """A certificate in a file; issued by itself where there is no issuer."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, path.stem)])
    signs_with, issued_by = (key, name) if issuer is None else (issuer[0], issuer[1].subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issued_by)
        .public_key(key.key.public_key())
        # Of one length, so that a test flips the same bits in every run: one of those that say how
        # many bits of a signature are unused may spell the same certificate in another way.
        .serial_number(x509.random_serial_number() | 1 << 158)
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=may_sign,
                key_cert_sign=is_authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                crl_sign=is_authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    certificate = builder.sign(signs_with.key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate
