"""Adapters that must be signed: by whom, and every byte."""

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing, verifying

from vllm_multilora.adapters import intake
from vllm_multilora.adapters.adapter_errors import (
    AdapterError,
    AdapterFormatError,
    AdapterReadError,
)
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.signing.signers import Signers
from vllm_multilora.cli import main
from vllm_multilora.errors import ConfigError

from ..checkpoints import MODULES, layout, weights, write
from ..packs import take
from .signed_folders import DAY, KeyPair, certify

RANKS = {module: 4 for module, _, _ in MODULES}
CONFIG, WEIGHTS, SIGNATURE = "adapter_config.json", "adapter_model.safetensors", "model.sig"


@dataclass(frozen=True)
class Site:
    """Signed adapters, and those by whom they may be signed."""

    root: Path
    ours: KeyPair
    theirs: KeyPair
    folder: Path
    other: Path

    def rules(self, *trusted: Path) -> Rules:
        keys = self.root / "keys.pem"
        keys.write_bytes(b"\n".join(path.read_bytes() for path in trusted or (self.ours.public,)))
        return Rules(signers=Signers.read(keys))

    def adapter(self, name: str, seed: int = 0) -> Path:
        return _adapter(self.root / name, seed)


def _adapter(folder: Path, seed: int = 0) -> Path:
    write(folder, weights(RANKS, seed=seed), rank=4, alpha=8)
    (folder / "README.md").write_text("What this adapter is for.\n")
    (folder / "training").mkdir()
    (folder / "training" / "log.txt").write_text("loss 0.1\n")
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("signed")
    ours, theirs = KeyPair.make(root, "ours"), KeyPair.make(root, "theirs")
    folder, other = ours.sign(_adapter(root / "a")), ours.sign(_adapter(root / "b", seed=1))
    return Site(root, ours, theirs, folder, other)


@pytest.fixture
def site(signed: Site, tmp_path: Path) -> Site:
    """A copy that may be changed."""
    shutil.copytree(signed.root, tmp_path, dirs_exist_ok=True)
    return Site(tmp_path, signed.ours, signed.theirs, tmp_path / "a", tmp_path / "b")


def refused(folder: Path, rules: Rules) -> list[tuple[Code, str]]:
    with (
        pytest.raises(AdapterFormatError) as caught,
        open_adapter(str(folder), rules) as source,
    ):
        source.check([layout()])
    return [(problem.code, str(problem)) for problem in caught.value.problems]


def test_what_is_signed_is_taken_as_it_is_without_signatures(site: Site) -> None:
    unsigned = take(site.folder, layout())
    pack = take(site.folder, layout(), rules=site.rules())
    assert pack.taken == unsigned.taken
    for row, matrices in unsigned.contents().items():
        assert all(map(torch.equal, pack.contents()[row], matrices))


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda one: one.name
)
def test_one_of_several_keys_has_signed(site: Site, curve: ec.EllipticCurve) -> None:
    key = KeyPair.make(site.root, "another", curve)
    path = key.sign(site.folder) / SIGNATURE
    rules = site.rules(site.theirs.public, site.ours.public, key.public)
    take(site.folder, layout(), rules=rules)
    bundle = json.loads(path.read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]  # of which key it is
    path.write_text(json.dumps(bundle))
    take(site.folder, layout(), rules=rules)


@pytest.mark.parametrize("algorithm", ["sha256", "blake2", "blake3"])
def test_all_of_the_formats_digests_are_known(site: Site, algorithm: str) -> None:
    files = hashing.Config().use_file_serialization(hashing_algorithm=algorithm)
    files.set_ignored_paths(paths=[Path(SIGNATURE)])
    config = signing.Config().use_elliptic_key_signer(private_key=site.ours.private)
    config.set_hashing_config(files).sign(site.folder, site.folder / SIGNATURE)
    take(site.folder, layout(), rules=site.rules())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("is_good", [True, False], ids=["good", "tampered"])
def test_no_file_of_a_signed_adapter_stays_open(site: Site, is_good: bool) -> None:
    if not is_good:
        flip_readme(site)
    before = open_files()
    with contextlib.suppress(AdapterError):
        take(site.folder, layout(), rules=site.rules())
    assert open_files() <= before


def test_digests_may_be_written_in_capital_letters(site: Site) -> None:
    capitals = lambda one: {"digest": one["digest"].upper()}  # noqa: E731
    resigned(lambda bundle: bundle.set_digests(capitals))(site)
    take(site.folder, layout(), rules=site.rules())


def test_nothing_is_said_of_files_in_a_folder_that_is_not_signed(site: Site) -> None:
    resigned(lambda bundle: bundle.leave_out("training", says_so=True))(site)
    flip_nested(site)
    take(site.folder, layout(), rules=site.rules())


def test_openssfs_own_code_verifies_what_the_command_signs(site: Site) -> None:
    config = verifying.Config().use_elliptic_key_verifier(public_key=site.ours.public)
    config.verify(site.folder, site.folder / SIGNATURE)


class Bundle:
    """A signature that is taken apart, and signed anew or not."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.path = site.folder / SIGNATURE
        self.content = json.loads(self.path.read_text())
        self.statement = json.loads(base64.b64decode(self.envelope["payload"]))

    @property
    def envelope(self) -> dict:
        return self.content["dsseEnvelope"]

    @property
    def resources(self) -> list[dict]:
        return self.statement["predicate"]["resources"]

    def add(self, name: str) -> None:
        self.resources.append({"name": name, "algorithm": "sha256", "digest": "00" * 32})

    def leave_out(self, part: str, *, says_so: bool = False) -> None:
        self.resources[:] = [one for one in self.resources if part not in one["name"]]
        if says_so:
            self.statement["predicate"]["serialization"]["ignore_paths"].append(part)

    def set_digests(self, change: Callable[[dict], dict]) -> None:
        for resource in self.resources:
            resource.update(change(resource))

    def write(self, *, anew: bool, subject: bytes | None = None) -> None:
        if anew:
            if subject is None:
                subject = b"".join(bytes.fromhex(one["digest"]) for one in self.resources)
            everything = hashes.Hash(hashes.SHA256())
            everything.update(subject)
            self.statement["subject"][0]["digest"]["sha256"] = everything.finalize().hex()
        payload = json.dumps(self.statement).encode()
        self.envelope["payload"] = base64.b64encode(payload).decode()
        if anew:
            kind = self.envelope["payloadType"]
            signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
            signature = self._site.ours.key.sign(signed, ec.ECDSA(hashes.SHA256()))
            self.envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
        self.path.write_text(json.dumps(self.content))


# Tampering. Each of these changes a signed folder, or those who are trusted.

Tamper = Callable[[Site], object]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flipped(name: str, at: int) -> Tamper:
    return lambda site: flip(site.folder / name, at)


def resigned(change: Callable[[Bundle], object]) -> Tamper:
    """A signature that holds something else, signed by who may sign."""

    def tamper(site: Site) -> None:
        bundle = Bundle(site)
        change(bundle)
        bundle.write(anew=True)

    return tamper


def linked(name: str, of_other: bool = False) -> Tamper:
    """A link in the place of a file or folder."""

    def tamper(site: Site) -> None:
        place = site.folder / name
        to = place.rename(site.root / "elsewhere")
        place.symlink_to(site.other / name if of_other else to)

    return tamper


def change_manifest(site: Site) -> None:
    """Another file's digest, under the old signature."""
    flip_weight(site)
    bundle = Bundle(site)
    digest = hashlib.sha256((site.folder / WEIGHTS).read_bytes()).hexdigest()
    bundle.set_digests(lambda one: {"digest": digest} if one["name"] == WEIGHTS else {})
    bundle.write(anew=False)


def say_something_twice(site: Site) -> None:
    """Gives a key twice: another program may read the other of the two values."""
    bundle = Bundle(site)
    text = json.dumps(bundle.content)
    bundle.path.write_text(text[:-1] + ', "dsseEnvelope": ' + json.dumps(bundle.envelope) + "}")


def material(**content: object) -> Tamper:
    return resigned(lambda bundle: bundle.content.update(verificationMaterial=content))


flip_weight, flip_readme = flipped(WEIGHTS, -1), flipped("README.md", 3)
flip_nested = flipped("training/log.txt", 3)
CERTIFICATE = {"rawBytes": ""}
NOT_AS_SIGNED, WRONG = Code.NOT_AS_SIGNED, Code.WRONG_SIGNATURE

TAMPERED: dict[str, tuple[Tamper, Code, str]] = {
    "file-added": (
        lambda site: (site.folder / "adapter_model.bin").write_bytes(b"anything"),
        *(NOT_AS_SIGNED, "adapter_model.bin is not in the signature"),
    ),
    "nested-file-added": (
        lambda site: (site.folder / "training" / "more.txt").touch(),
        *(NOT_AS_SIGNED, "training/more.txt is not in the signature"),
    ),
    "file-removed": (
        lambda site: (site.folder / "README.md").unlink(),
        *(NOT_AS_SIGNED, "README.md is missing"),
    ),
    "file-renamed": (
        lambda site: (site.folder / "README.md").rename(site.folder / "NOTES.md"),
        *(NOT_AS_SIGNED, "NOTES.md is not in the signature"),
    ),
    "weight-flipped": (flip_weight, NOT_AS_SIGNED, WEIGHTS),
    "header-flipped": (flipped(WEIGHTS, 20), NOT_AS_SIGNED, WEIGHTS),
    "config-flipped": (flipped(CONFIG, 5), NOT_AS_SIGNED, CONFIG),
    "readme-flipped": (flip_readme, NOT_AS_SIGNED, "README.md"),
    "nested-file-flipped": (flip_nested, NOT_AS_SIGNED, "training/log.txt"),
    "weights-cut": (
        lambda site: os.truncate(site.folder / WEIGHTS, 2_000),
        *(NOT_AS_SIGNED, WEIGHTS),
    ),
    "weights-lengthened": (
        lambda site: os.truncate(site.folder / WEIGHTS, 200_000),
        *(NOT_AS_SIGNED, WEIGHTS),
    ),
    "signed-by-another": (
        lambda site: site.theirs.sign(site.folder),
        *(WRONG, "which is not trusted here"),
    ),
    "signature-of-another": (
        lambda site: shutil.copy(site.other / SIGNATURE, site.folder / SIGNATURE),
        *(NOT_AS_SIGNED, WEIGHTS),
    ),
    "signature-removed": (
        lambda site: (site.folder / SIGNATURE).unlink(),
        *(Code.NOT_SIGNED, "model.sig is missing"),
    ),
    "signature-cut": (
        lambda site: os.truncate(site.folder / SIGNATURE, 100),
        *(WRONG, "not JSON"),
    ),
    "file-linked": (linked("README.md"), NOT_AS_SIGNED, "README.md is a link"),
    "weights-linked": (linked(WEIGHTS, of_other=True), NOT_AS_SIGNED, f"{WEIGHTS} is a link"),
    "folder-linked": (linked("training"), NOT_AS_SIGNED, "training is a link"),
    "manifest-changed": (change_manifest, WRONG, "does not match its manifest"),
    "weights-unsigned": (
        resigned(lambda bundle: bundle.leave_out(WEIGHTS)),
        *(NOT_AS_SIGNED, f"{WEIGHTS} is not in the signature"),
    ),
    "weights-said-not-to-matter": (
        resigned(lambda bundle: bundle.leave_out(WEIGHTS, says_so=True)),
        *(NOT_AS_SIGNED, f"{WEIGHTS} is not in the signature"),
    ),
    "path-outside": (
        resigned(lambda bundle: bundle.add("../b/README.md")),
        *(WRONG, "'../b/README.md'"),
    ),
    "path-absolute": (
        resigned(lambda bundle: bundle.add("/etc/hostname")),
        *(WRONG, "'/etc/hostname'"),
    ),
    "file-signed-twice": (
        resigned(lambda bundle: bundle.add(bundle.resources[0]["name"])),
        *(WRONG, "twice"),
    ),
    "broken-digest": (
        resigned(lambda bundle: bundle.set_digests(lambda _: {"algorithm": "crc32"})),
        *(WRONG, "'crc32'"),
    ),
    "long-chain": (
        material(x509CertificateChain={"certificates": [CERTIFICATE] * 9}),
        *(WRONG, "9 certificates"),
    ),
    "key-twice": (say_something_twice, WRONG, "the key 'dsseEnvelope' occurs twice"),
    "signed-twice": (
        resigned(
            lambda bundle: bundle.envelope.update(signatures=bundle.envelope["signatures"] * 2)
        ),
        *(WRONG, "2 signatures"),
    ),
    "another-subject": (
        lambda site: Bundle(site).write(anew=True, subject=b"of other files"),
        *(WRONG, "does not match its subject"),
    ),
    "another-kind-of-statement": (
        resigned(
            lambda bundle: bundle.statement.update(predicateType="https://slsa.dev/provenance/v1")
        ),
        *(WRONG, "slsa.dev"),
    ),
    "of-sigstores-service": (
        material(certificate=CERTIFICATE),
        *(WRONG, "keyless ones can only be checked"),
    ),
}


@pytest.mark.parametrize(("tamper", "code", "text"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_refused(
    site: Site, tamper: Tamper, code: Code, text: str
) -> None:
    tamper(site)
    problems = refused(site.folder, site.rules())
    assert {found for found, _ in problems} == {code}
    assert any(text in message for _, message in problems), problems


def test_every_byte_of_the_signature_counts(site: Site) -> None:
    """But for those that say nothing: a changed signature is refused, or is the same signature."""
    path, rules = site.folder / SIGNATURE, site.rules()
    content = path.read_bytes()
    payload = content.index(b'"payload"')
    for at in range(payload, len(content), 37):
        flip(path, at)
        assert {code for code, _ in refused(site.folder, rules)} == {Code.WRONG_SIGNATURE}, at
        path.write_bytes(content)


def test_nothing_is_parsed_of_what_is_not_as_signed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(intake.AdapterConfig, "read", parse)
    monkeypatch.setattr(intake, "TensorFile", parse)
    flip_readme(site)
    assert refused(site.folder, site.rules())[0][0] is Code.NOT_AS_SIGNED


@pytest.mark.parametrize("at", [20, -1], ids=["header", "weights"])
def test_what_changes_between_the_check_and_the_use_is_not_used(
    site: Site, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a file's times do not tell, as with writes through a memory map."""
    monkeypatch.setattr(
        "vllm_multilora.adapters.files.regular_file.Fingerprint.__eq__", lambda *_: True
    )
    path, content = site.folder / WEIGHTS, (site.folder / WEIGHTS).read_bytes()
    space = content.index(b"pt", 8)  # in the metadata, which nobody looks at
    read = intake.AdapterConfig.read

    def change_now(*arguments: object) -> object:
        flip(path, space if at > 0 else at)
        return read(*arguments)

    monkeypatch.setattr(intake.AdapterConfig, "read", change_now)
    with open_adapter(str(site.folder), site.rules()) as source:
        checked = source.check([layout()])
        with pytest.raises(AdapterReadError, match="written to while"):
            checked.read(None, None)


def test_a_folder_of_very_many_or_deeply_nested_files_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = site.folder.joinpath(*["d"] * 30)
    deep.mkdir(parents=True)
    (deep / "file").touch()
    assert "nested too deeply" in refused(site.folder, site.rules())[0][1]
    shutil.rmtree(site.folder / "d")
    monkeypatch.setattr("vllm_multilora.adapters.signing.signed_files.MAX_FILES", 3)
    assert "more than 3 files" in refused(site.folder, site.rules())[0][1]


def test_the_version_tells_signatures_and_those_who_may_sign_apart(site: Site) -> None:
    def version(rules: Rules) -> str:
        with open_adapter(str(site.folder), rules) as source:
            return source.version

    one, both = site.rules(), site.rules(site.ours.public, site.theirs.public)
    first = version(one)
    assert version(both) != first
    assert version(one) == first
    site.ours.sign(site.folder)
    assert version(one) != first


# Certificates.


@pytest.fixture
def root(site: Site) -> tuple[KeyPair, object]:
    key = KeyPair.make(site.root, "root")
    return key, certify(site.root / "root.pem", key, is_authority=True)


def sign_with_certificate(
    site: Site, issuer: tuple, *chain: str, **options: timedelta | bool
) -> None:
    """Signs with a key that somebody has issued a certificate for, in `leaf.pem`."""
    leaf, certificate = KeyPair.make(site.root, "leaf"), site.root / "leaf.pem"
    certify(certificate, leaf, issuer, **options)
    others = [word for name in chain for word in ("--chain", site.root / name)]
    leaf.sign(site.folder, "--certificate", certificate, *others)


def test_a_certificate_is_trusted_through_those_that_lead_to_one_in_the_file(
    site: Site, root: tuple
) -> None:
    middle = KeyPair.make(site.root, "middle")
    between = certify(site.root / "middle.pem", middle, root, is_authority=True)
    sign_with_certificate(site, (middle, between), "middle.pem")
    take(site.folder, layout(), rules=site.rules(site.root / "root.pem"))
    take(site.folder, layout(), rules=site.rules(site.root / "leaf.pem"))
    assert "not trusted" in refused(site.folder, site.rules())[0][1]
    verifier = verifying.Config().use_certificate_verifier(
        certificate_chain=[site.root / "root.pem"]
    )
    verifier.verify(site.folder, site.folder / SIGNATURE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"begins": -2 * DAY, "ends": -DAY}, "valid from"),
        ({"begins": DAY, "ends": 2 * DAY}, "valid from"),
        ({"may_sign": False}, "not for signing"),
    ],
    ids=["expired", "not yet valid", "for something else"],
)
def test_a_certificate_must_be_valid_now_and_for_signing(
    site: Site, root: tuple, options: dict, text: str
) -> None:
    sign_with_certificate(site, root, **options)
    for trusted in ("root.pem", "leaf.pem"):
        ((code, message),) = refused(site.folder, site.rules(site.root / trusted))
        assert code is Code.WRONG_SIGNATURE
        assert text in message


def test_an_authority_must_be_valid_now(site: Site) -> None:
    key = KeyPair.make(site.root, "root")
    expired = certify(site.root / "root.pem", key, is_authority=True, ends=-DAY / 2)
    sign_with_certificate(site, (key, expired))
    assert "not trusted" in refused(site.folder, site.rules(site.root / "root.pem"))[0][1]


def test_whoever_has_a_certificate_cannot_issue_others(site: Site, root: tuple) -> None:
    customer = KeyPair.make(site.root, "customer")
    own = certify(site.root / "customer.pem", customer, root)
    sign_with_certificate(site, (customer, own), "customer.pem")
    assert "not trusted" in refused(site.folder, site.rules(site.root / "root.pem"))[0][1]
    trusted = site.rules(site.root / "root.pem", site.root / "customer.pem")
    assert "not trusted" in refused(site.folder, trusted)[0][1]


def test_a_broken_certificate_is_refused_and_breaks_nothing(site: Site, root: tuple) -> None:
    sign_with_certificate(site, root)
    bundle, rules = Bundle(site), site.rules(site.root / "root.pem")
    (first, *_) = bundle.content["verificationMaterial"]["x509CertificateChain"]["certificates"]
    der = base64.b64decode(first["rawBytes"])
    for at in range(len(der)):
        broken = bytearray(der)
        broken[at] ^= 1 << at % 8
        first["rawBytes"] = base64.b64encode(broken).decode()
        bundle.path.write_text(json.dumps(bundle.content))
        assert {code for code, _ in refused(site.folder, rules)} == {Code.WRONG_SIGNATURE}, at


def test_whatever_a_signature_holds_it_is_refused_or_right(site: Site) -> None:
    source, rules = random.Random(0), site.rules()
    path = site.folder / SIGNATURE
    content = path.read_text()
    values = (None, True, -1, 1.5, "", "AAAA", "é", [], [[]], {}, [{}], {"": {}})
    outcomes = set()
    for _ in range(400):
        bundle = json.loads(content)
        place: Any = bundle
        while True:
            key = source.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not (isinstance(place[key], dict | list) and place[key]) or source.random() < 0.2:
                break
            place = place[key]
        if source.random() < 0.3 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = source.choice(values)
        path.write_text(json.dumps(bundle))
        try:
            with open_adapter(str(site.folder), rules) as opened:
                opened.verify()
            outcomes.add("right")
        except AdapterFormatError as error:
            outcomes |= {problem.code for problem in error.problems}
    assert outcomes == {"right", Code.WRONG_SIGNATURE}


# The file of keys, and the commands.

SM2_KEY = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoEcz1UBgi0DQgAEu2UEEx9SRenZwAb+RZfHHqbj/+4p
tXxT0bXw0RAScbtNQNRBRPKVdeDtRVKJE4yxYeHdcOMDJ2kvewqQFk2Gnw==
-----END PUBLIC KEY-----
"""
"""On a curve that the package cryptography has not."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory, expected "),
        (b"", "has no key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "cannot be used"),
        ("ours.key", "PRIVATE KEY that cannot be used"),
        ("k1.pub", "a key of another kind"),
        (SM2_KEY, "cannot be used .*not supported"),
    ],
)
def test_a_mistake_in_the_file_of_keys_is_said(site: Site, content: object, message: str) -> None:
    KeyPair.make(site.root, "k1", ec.SECP256K1())
    path = site.root / "keys.pem"
    if content is not None:
        path.write_bytes(
            (site.root / content).read_bytes() if isinstance(content, str) else content
        )
    with pytest.raises(ConfigError, match=message):
        Signers.read(path)


def test_the_command_verifies_as_a_server_does(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("--keys", str(site.ours.public))
    assert main(["verify", str(site.folder), str(site.other), *keys]) == 0
    flip_weight(site)
    assert main(["verify", str(site.folder), str(site.other), *keys]) == 1
    captured = capsys.readouterr()
    assert f"{site.other}: as it was signed" in captured.out
    assert "as signed" in captured.err
    assert main(["verify", str(site.other), "--keys", str(site.folder / CONFIG)]) == 2
    assert "has no key" in capsys.readouterr().err


def pem(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    encryption: serialization.KeySerializationEncryption | None = None,
) -> bytes:
    kind, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    return key.private_bytes(encoding, kind, encryption or serialization.NoEncryption())


def test_what_cannot_be_signed_is_said(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    key = ("--key", str(site.ours.private))
    assert main(["sign", str(site.root / "nowhere"), *key]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    secret = serialization.BestAvailableEncryption(b"secret")
    for key_file, found in (
        (site.ours.public.read_bytes(), "no private key"),
        (pem(site.ours.key, secret), "an encrypted key"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "a key of another kind"),
        (pem(rsa.generate_private_key(65537, 2048)), "a key of another kind"),
    ):
        (site.root / "wrong.key").write_bytes(key_file)
        assert main(["sign", str(site.folder), "--key", str(site.root / "wrong.key")]) == 2
        assert f"wrong.key: found {found}, expected a private key" in capsys.readouterr().err
    (site.folder / "link").symlink_to(site.folder / CONFIG)
    assert main(["sign", str(site.folder), *key]) == 2
    assert "symlink" in capsys.readouterr().err
