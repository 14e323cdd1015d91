"""`vllm-multilora tenants`: makes keys, hashes them, and checks a tenants file."""

from __future__ import annotations

import argparse
import getpass
import sys

from vllm_multilora.documents import DocumentError
from vllm_multilora.errors import ConfigError
from vllm_multilora.tenants.keys import MAX_KEY_LENGTH, can_be_sent, new_key, stored
from vllm_multilora.tenants.tenants_file import load_tenants
from vllm_multilora.wording import counted

GOOD, BAD = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("new", "hash", "check"),
        help="new: print a random key and its hash; hash: print the hash of a key read from "
        "standard input; check: check a tenants file",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the tenants file, for check")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.action == "check") != (arguments.file is not None):
        raise ConfigError("check takes a file, new and hash none")
    if arguments.action == "check":
        return _check(arguments.file)
    key = new_key() if arguments.action == "new" else _given_key()
    if not can_be_sent(key):
        print(
            f"vllm-multilora tenants: error: found no key that HTTP can carry, expected 1 to "
            f"{MAX_KEY_LENGTH} printable ASCII characters in one line",
            file=sys.stderr,
        )
        return BAD
    if arguments.action == "new":
        print(key)
    print(stored(key))
    return GOOD


def _given_key() -> str:
    # Never an argument: those are in the shell's history and in everybody's process list.
    if sys.stdin is None:  # closed by whoever started this
        return ""
    if sys.stdin.isatty():
        return getpass.getpass("key: ")
    return sys.stdin.readline().rstrip("\r\n")


def _check(path: str) -> int:
    try:
        tenants = load_tenants(path)
    except DocumentError as error:
        if isinstance(error.__cause__, OSError):
            raise  # what is in the file cannot be told
        print(f"vllm-multilora tenants: error: {error}", file=sys.stderr)
        return BAD
    print(f"{path}: {counted(len(tenants.by_name), 'tenant')}")
    for name, tenant in tenants.by_name.items():
        what = [*tenant.adapters.patterns, *tenant.routes.patterns]
        what += ["the base model"] if tenant.base_model else []
        print(f"  {name}: {', '.join(what) or 'may use nothing'}")
    return GOOD
