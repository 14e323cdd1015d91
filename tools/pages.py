"""Fills the tables in docs/ that are made of the code; `python -m tools.pages` writes them.

A table stands between two comments in its page, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path

from tools.kernels import model
from tools.kernels.modelled.cases import RANKS
from tools.kernels.modelled.machine import GPUS
from vllm_multilora.adapters.problems import Code
from vllm_multilora.config import MultiLoRAConfig, flag_of
from vllm_multilora.metrics.definitions import ALL, COMMON_LABELS

DOCS = Path(__file__).parents[1] / "docs"
CLIENTS = Path(__file__).parents[1] / "tests/clients/record.json"

_TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=\n<!-- end -->)", re.S)

_CODES = {
    Code.FOLDER_MISSING: "there is no such folder",
    Code.FILE_MISSING: "the folder lacks a file that an adapter has",
    Code.FILE_UNREADABLE: "the system does not let it be read",
    Code.FILE_CHANGED: "it was written to while it was read",
    Code.FILE_TOO_LARGE: "it is larger than any adapter of this base model, or mostly holes",
    Code.NOT_A_FILE: "a pipe, a device or a folder is in its place",
    Code.NOT_ALLOWED: "it lies outside `--multilora-allowed-roots`, or its source refuses access",
    Code.NOT_SIGNED: "there is no signature, and `--multilora-signing-keys` asks for one",
    Code.WRONG_DIGEST: "its weights are not those that `--multilora-require-digest` names",
    Code.WRONG_SIGNATURE: "nobody who is trusted has signed it, or the signature is broken",
    Code.NOT_AS_SIGNED: "it has changed since it was signed",
    Code.NOT_SAFETENSORS: "it does not begin as a safetensors file does",
    Code.NOT_PICKLED_TENSORS: "the pickled file holds something other than tensors",
    Code.CONFIG_NOT_JSON: "the configuration is not a JSON object",
    Code.CONFIG_KEY_MISSING: "a key is missing without which nothing can be applied",
    Code.CONFIG_VALUE: "a value is of the wrong kind, or out of range",
    Code.CONFIG_PATTERN: "a pattern is no regular expression, or takes too long",
    Code.UNSUPPORTED_FEATURE: "PEFT has a feature here that this server does not serve",
    Code.UNSUPPORTED_PEFT_TYPE: "it is another kind of adapter than LoRA",
    Code.UNSUPPORTED_MODULES_TO_SAVE: "it has whole modules other than classification heads",
    Code.RANK_TOO_LARGE: "its rank is above `--max-lora-rank`",
    Code.HEADER_TOO_LARGE: "the header is longer than this base model can need",
    Code.HEADER_NOT_JSON: "the header is not a JSON object",
    Code.HEADER_ENTRY: "an entry of the header is not a tensor's",
    Code.HEADER_OFFSETS: "a tensor does not begin where the one before it ends",
    Code.FILE_SIZE: "the file is shorter or longer than its header says",
    Code.TOO_MANY_TENSORS: "there are more tensors than modules could use",
    Code.NO_LORA_TENSORS: "there are no LoRA tensors in it",
    Code.NO_MATCHING_MODULES: "none of its modules is in the base model",
    Code.NOTHING_APPLIED: "the server adapts none of its modules",
    Code.UNKNOWN_MODULE: "the base model has no such module",
    Code.MERGED_MODULE: "it is for a module that the base model has in parts, or for a part of one",
    Code.LAYER_OUT_OF_RANGE: "it adapts layers that the base model does not have",
    Code.UNKNOWN_TENSOR: "a tensor belongs to no module, or to one that is not configured",
    Code.DUPLICATE_TENSOR: "two tensors are for the same matrix",
    Code.HALF_MISSING: "a module lacks a matrix or its magnitudes (DoRA), a head lacks its weight, "
    "or experts that are stored together lack one of their two parameters",
    Code.WRONG_DTYPE: "a tensor is of a type that adapters do not have",
    Code.EMPTY_TENSOR: "a tensor has no elements",
    Code.WRONG_SHAPE: "a tensor does not fit its module",
    Code.WRONG_VOCABULARY: "it was made for a vocabulary of another size",
    Code.RANKS_DIFFER: "a module's two matrices have different ranks",
    Code.RANK_NOT_AS_CONFIGURED: "its rank is not the one that the configuration names",
    Code.NOT_FINITE: "it holds NaN or infinity",
    Code.OVERFLOW: "its numbers or their scaling are too large for the slot's type",
    Code.MORE_PROBLEMS: "how many more there are than are told",
}


def settings() -> Iterable[str]:
    """Every setting, in the order of `MultiLoRAConfig`."""
    yield "| flag of `vllm serve` | key | default | meaning |"
    yield "|---|---|---|---|"
    for setting in fields(MultiLoRAConfig):
        options = setting.metadata["options"]
        flag = f"`{' '.join(filter(None, (_flag(setting), options.get('metavar'))))}`"
        if choices := options.get("choices"):
            flag += ": " + ", ".join(f"`{choice}`" for choice in choices)
        meaning = options["help"].replace("%%", "%").replace("__", r"\_\_")
        yield f"| {flag} | `{setting.name}` | {_default(setting)} | {meaning} |"


def _flag(setting: Field[object]) -> str:
    flag = flag_of(setting.name)
    if setting.default is True or setting.name == "enabled":
        return flag.replace("--", "--[no-]", 1)
    return flag


def _default(setting: Field[object]) -> str:
    default = setting.default
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None or default == () else f"`{default}`"


def metrics() -> Iterable[str]:
    """Every metric of the plugin's own."""
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for metric in ALL:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.help} |"
    yield ""
    common = " and ".join(f"`{label}`" for label in COMMON_LABELS)
    yield (
        f"All have vLLM's labels {common}, too; metrics that API servers count have no `engine`."
    )


def problems() -> Iterable[str]:
    """Every code of a problem."""
    yield "| code | what is wrong |"
    yield "|---|---|"
    for code in Code:
        yield f"| `{code}` | {_CODES[code]} |"


def gpu_model(max_rank: int) -> Iterable[str]:
    """What the kernels' analytical model expects of an H100, for servers of a maximum rank."""
    yield from model.table(GPUS["H100"], max_rank)


def gpu_losses() -> Iterable[str]:
    """Where the model expects these kernels to be slower than others on an H100."""
    yield from model.losses(GPUS["H100"])


def clients() -> Iterable[str]:
    """What each client has shown in the last run of their tests."""
    record = json.loads(CLIENTS.read_text())
    shown: dict[tuple[str, str], dict[str, None]] = {}
    for test in record["tests"].values():
        shown.setdefault((test["client"], test["version"]), {})[test["proves"]] = None
    yield f"| client | version | what it has shown with vLLM {record['vllm']} |"
    yield "|---|---|---|"
    for (client, version), proofs in sorted(shown.items(), key=lambda row: row[0][0].lower()):
        yield f"| {client} | {version} | {'<br>'.join(proofs)} |"


_TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "settings": settings,
    "metrics": metrics,
    "problems": problems,
    "clients": clients,
    **{f"gpu_model_{rank}": partial(gpu_model, rank) for rank in RANKS},
    "gpu_losses": gpu_losses,
    "gpu_published": model.published_table,
}


def filled(text: str) -> str:
    """A page with its tables as they should be.

    Raises:
        KeyError: It has a table that nothing is known of.
    """
    return _TABLE.sub(lambda found: found[1] + found[2] + "\n".join(_TABLES[found[1]]()), text)


def main() -> int:
    """Writes all pages."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            print(f"{page.name}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
