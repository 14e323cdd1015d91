"""`vllm-multilora verify`: checks that adapter folders match their signatures."""

from __future__ import annotations

import argparse
import sys

VERIFIED, REFUSED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="an adapter's folder")
    parser.add_argument(
        "--keys",
        required=True,
        metavar="FILE",
        help="public keys and certificates in PEM, as for --multilora-signing-keys",
    )


def run(arguments: argparse.Namespace) -> int:
    from vllm_multilora.adapters.adapter_errors import AdapterError
    from vllm_multilora.adapters.intake import Rules, open_adapter
    from vllm_multilora.adapters.signing.signers import Signers

    rules = Rules(signers=Signers.read(arguments.keys))
    status = VERIFIED
    for folder in arguments.adapters:
        try:
            with open_adapter(folder, rules) as source:
                source.verify()
        except AdapterError as error:
            status = REFUSED
            print(f"{folder}: {error}", file=sys.stderr)
        else:
            print(f"{folder}: as it was signed")
    return status
