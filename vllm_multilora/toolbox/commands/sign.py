"""`vllm-multilora sign`: signs adapter folders with a key."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_multilora.errors import MultiLoRAError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="an adapter's folder")
    parser.add_argument(
        "--key",
        required=True,
        metavar="FILE",
        help="the private key in PEM, not encrypted, on the curve P-256, P-384 or P-521",
    )
    parser.add_argument(
        "--certificate",
        metavar="FILE",
        help="the key's certificate in PEM, so that servers need to trust only its issuer",
    )
    parser.add_argument(
        "--chain",
        action="append",
        default=[],
        metavar="FILE",
        help="an intermediate certificate, up to one that servers trust; repeatable",
    )


def run(arguments: argparse.Namespace) -> int:
    from model_signing import hashing, signing

    from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME
    from vllm_multilora.adapters.signing.signature import SIGNATURE_NAME

    try:
        _require_key(Path(arguments.key))
        config = signing.Config()
        if arguments.certificate is None:
            config.use_elliptic_key_signer(private_key=arguments.key)
        else:
            config.use_certificate_signer(
                private_key=arguments.key,
                signing_certificate=arguments.certificate,
                # It fails on none, and takes the first one twice.
                certificate_chain=arguments.chain or [arguments.certificate],
            )
        for folder in map(Path, arguments.adapters):
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder")
            if not (folder / CONFIG_NAME).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {CONFIG_NAME}, expected an adapter's folder; give the folder "
                    "of each adapter, not the one that they lie in"
                )
            path = folder / SIGNATURE_NAME
            hashes = hashing.Config().set_ignored_paths(paths=[Path(SIGNATURE_NAME)])
            config.set_hashing_config(hashes).sign(folder, path)
            print(path)
    except (OSError, TypeError, ValueError) as error:
        what = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            what = f"{error.filename}: {error.strerror}"
        raise MultiLoRAError(what) from error
    return 0


def _require_key(path: Path) -> None:
    """Checks a private key; model_signing's own errors do not name the file."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from vllm_multilora.adapters.signing.signers import is_signing_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except TypeError:
        found = "an encrypted key"
    except ValueError:
        found = "no private key"
    else:
        if is_signing_key(key.public_key()):
            return
        found = "a key of another kind"
    raise ValueError(
        f"{path}: found {found}, expected a private key in PEM, not encrypted, on the curve P-256, "
        "P-384 or P-521"
    )
