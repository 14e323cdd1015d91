"""Makes docs/compatibility.md of the results; `python -m tools.testbed.compatibility` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.results import Result, load
from vllm_multilora.integration.patching.patch import RUNS
from vllm_multilora.integration.patching.tables.ledger import PATCHES

FILE = Path(__file__).parents[2] / "docs" / "compatibility.md"

TESTED, SAME_PATH, NO = "tested", "same path", "no"


@dataclass(frozen=True)
class Row:
    """A feature of vLLM's, or of the plugin's.

    Attributes:
        feature: Its name, as the tests' marks have it.
        untested: What holds where no test of it has run: `same path`, or `no`.
        note: Why that holds, or what the test leaves out.
    """

    feature: str
    untested: str = ""
    note: str = ""


ROWS = (
    Row("text generation"),
    Row("`embed_tokens` and `lm_head`"),
    Row(
        "`embed_tokens` and `lm_head` that are tied",
        SAME_PATH,
        "Adapters of either, and of both.",
    ),
    Row("prefix caching"),
    Row("chunked prefill"),
    Row("prompt_logprobs"),
    Row("n > 1"),
    Row("beam search"),
    Row("structured outputs"),
    Row("priorities"),
    Row("preemption"),
    Row(
        "speculative decoding (ngram)",
        NO,
        "vLLM's second model runner refuses it before 0.32, and the first one of 0.30 takes no "
        "drafts on CPUs.",
    ),
    Row(
        "speculative decoding (draft model)",
        SAME_PATH,
        "Drafts are the base model's own; adapters verify them. vLLM's second model runner refuses "
        "draft models before 0.31.",
    ),
    Row("speculative decoding (EAGLE)", SAME_PATH, "As above."),
    Row(
        "quantised base models",
        SAME_PATH,
        "Schemes that vLLM's CPU build runs: GPTQ, AWQ and compressed-tensors with weights of 4 "
        "bits; on processors with AMX, also compressed-tensors with weights and activations of 8, "
        "with which vLLM starts no server with LoRA elsewhere. DoRA adapters are refused.",
    ),
    Row(
        "images",
        SAME_PATH,
        "A LLaVA, a Qwen2-VL and an Idefics3. With an image in the prompt nobody is quarantined, "
        "as a client may bring numbers of its own.",
    ),
    Row(
        "`--enable-tower-connector-lora`",
        NO,
        "A server with this flag is left to stock vLLM, and its log says so. Without the flag, "
        "adapters of towers and connectors alone are refused. Of those that adapt the language "
        "model too, that part acts, as in vLLM.",
    ),
    Row(
        "speech (Whisper)",
        SAME_PATH,
        "Adapters of encoder and decoder. Nobody is quarantined, as with images.",
    ),
    Row(
        "models with a state",
        SAME_PATH,
        "A Granite 4 with a Mamba 2 layer. Qwen3-Next and Qwen3.5, with Gated DeltaNet, need a GPU "
        "to have adapters: vLLM's CPU build refuses the one, and has no experts for the other. "
        "Those before 0.32 have Mamba layers in bfloat16 alone: there, prompts' scores are "
        "compared.",
    ),
    Row("embeddings"),
    Row(
        "scoring and classification of requests",
        SAME_PATH,
        "With the base model's head and, from 0.31 on, with adapters' own, saved whole or adapted.",
    ),
    Row(
        "classification of tokens",
        SAME_PATH,
        "With the base model's head. Adapters with a head of their own are refused, except by 0.33 "
        "for a few models: its smoke tests have a BERT with such adapters.",
    ),
    Row(
        "MoE formats",
        SAME_PATH,
        "What slots hold is tested against what PEFT adds to experts, and the metadata that vLLM's "
        "kernels read at the interface of its layers; those kernels need a GPU. On CPUs the "
        "plugin's own kernels answer as PEFT does (`tests/serving/experts`).",
    ),
    Row(
        "activated LoRA",
        SAME_PATH,
        "The second model runner's rows also at the interface of its inputs.",
    ),
    Row("activated LoRA with TP 2 and drafted tokens", SAME_PATH),
    Row("DoRA", SAME_PATH, "The Triton kernels' part in the interpreter."),
    Row("DoRA with TP 2", SAME_PATH),
    Row("blends of adapters", SAME_PATH, "Once packed, a blend is an adapter like others."),
    Row("blends of adapters with TP 2", SAME_PATH),
    Row("Triton kernels", SAME_PATH, "In Triton's interpreter: see [GPUs](gpu.md)."),
    Row("TP 2"),
    Row("fully sharded"),
    Row("DP 2", SAME_PATH, "With two API servers."),
    Row("several API servers", SAME_PATH, "With two engines."),
    Row("registration over HTTP"),
    Row("which weights answer a name", SAME_PATH, "The gateway reads names before vLLM does."),
    Row("chat completions, responses and messages"),
    Row(
        "transcriptions and translations",
        SAME_PATH,
        "Of WAV files, which vLLM reads with `soundfile`. If a request does not say which language "
        "it is in, vLLM detects that with the base model, without the adapter.",
    ),
    Row("routes for scores, ranks, classes and pooled states", SAME_PATH),
    Row(
        "vLLM's filesystem resolver",
        SAME_PATH,
        "With `VLLM_PLUGINS` unset; `make test` also has it name the resolver and `multilora`, "
        "with 0.32 and the first model runner.",
    ),
    Row("`vllm run-batch` and `vllm bench serve`", SAME_PATH),
    Row("reload beside running requests"),
    Row("default adapters for images and audio"),
    Row("pinning"),
    Row("metrics"),
    Row("quarantine"),
    Row("other weights for the base model"),
    Row(
        "sleep",
        SAME_PATH,
        "vLLM's sleep mode needs a GPU. The return of adapters to slots whose memory is lost is "
        "tested by overwriting that memory.",
    ),
    Row(
        "pipeline parallelism",
        SAME_PATH,
        "Each stage holds the adapters of its own layers. vLLM's CPU build cannot run it.",
    ),
    Row(
        "vLLM's front end in Rust",
        NO,
        "It loads no plugins; the server warns about what is missing when it starts.",
    ),
)


def page(results: Mapping[str, Result]) -> str:
    """The page, from the results of all runs."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Result]) -> Iterator[str]:
    yield "# Compatibility"
    yield ""
    yield (
        "This page shows what is tested with which version of vLLM and which model runner. "
        "`make test-all` runs the tests, all of"
    )
    yield (
        "them with real vLLM on a CPU, and compares answers with PEFT's. The page is generated "
        "from their results"
    )
    yield "(`python -m tools.testbed.compatibility`)."
    yield ""
    yield (
        "vLLM has two model runners. On CUDA it uses the second by default. Its CPU builds use the "
        "first, and can run the second only"
    )
    yield (
        "with a Triton that has a backend for CPUs: [the test bed](../tools/testbed/README.md) has "
        "one, which interprets."
    )
    yield ""
    yield f"| feature | {' | '.join(map(_title, RUNS))} |"
    yield f"|---|{'---|' * len(RUNS)}"
    notes: list[str] = []
    for row in ROWS:
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f" [{len(notes)}]"
        cells = (_cell(row, results.get(run), results) for run in RUNS)
        yield f"| {row.feature}{mark} | {' | '.join(cells)} |"
    yield ""
    yield f"* `{TESTED}`: tests of it have passed."
    yield f"* `{SAME_PATH}`: not tested there, but the same path through the code as where it is."
    yield f"* `{NO}`: they do not work together, for the reason given."
    yield "* `-`: the smoke tests have not run there yet."
    yield ""
    yield from (f"{number}. {note}" for number, note in enumerate(notes, 1))
    yield ""
    yield "| run | vLLM | tests passed | ledger entries called |"
    yield "|---|---|---|---|"
    for run in RUNS:
        if (result := results.get(run)) is not None:
            yield f"| {_title(run)} | {result.vllm} | {result.tests} | {len(result.called)} |"
    called = {name for result in results.values() for name in result.called}
    missed = [f"`{patch.name}`" for patch in PATCHES if patch.name not in called]
    yield ""
    yield f"Ledger entries that no run has called: {', '.join(missed) or 'none'}."
    yield ""
    yield "## A newer vLLM"
    yield ""
    yield (
        "`vllm-multilora doctor --against WHEEL-OR-DIR` reports within a minute what another "
        "version of vLLM changes for the plugin. It"
    )
    yield (
        "reads that version's source only, and checks that everything that the plugin replaces, "
        "extends or imports is there, with the"
    )
    yield "same parameters as in the versions above."
    yield ""
    yield (
        "The plugin asks the same of a newer vLLM when a server starts. LoRA serving is active "
        "there if all that it needs is as known, and so"
    )
    yield "is the gateway (HTTP, names, keys, tenants): each decides for itself."


def _title(run: str) -> str:
    version, _, runner = run.partition("/")
    return f"{version}, {'second' if runner else 'first'}"


def _cell(row: Row, result: Result | None, results: Mapping[str, Result]) -> str:
    if result is None:
        works = any(each.features.get(row.feature) == "passed" for each in results.values())
        return NO if row.untested == NO and not works else "-"
    return TESTED if result.features.get(row.feature) == "passed" else row.untested or "-"


if __name__ == "__main__":
    FILE.write_text(page(load()))
    sys.stdout.write(f"{FILE} is up to date\n")
