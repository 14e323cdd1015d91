"""The clients, and how each is run: as a script in the clients' own environment."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = Path(os.environ.get("MULTILORA_CLIENTS", ROOT / ".venv-clients")).absolute()
BIN, NODE_MODULES = ENVIRONMENT / "bin", ENVIRONMENT / "node" / "node_modules"
LIMIT_S = 180.0


@dataclass(frozen=True)
class Program:
    """A client of vLLM's server.

    Attributes:
        name: As the table in the docs has it.
        package: Where its version is read: a Python distribution, or a folder of node_modules.
        script: The script that uses it.
    """

    name: str
    package: str
    script: str

    @property
    def key(self) -> str:
        """The key of a tenant that only this client uses."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name).strip("-")

    @property
    def version(self) -> str:
        """The version that is installed."""
        if self.script.endswith(".cjs"):
            file = NODE_MODULES / self.package / "package.json"
            return str(json.loads(file.read_text())["version"])
        return installed(self.package)

    def run(self, call: str, task: Mapping[str, Any]) -> Any:
        """What the script prints for one of its calls, as JSON."""
        interpreter = "node" if self.script.endswith(".cjs") else "python"
        shown = run(interpreter, str(SCRIPTS / self.script), call, given=json.dumps(task))
        return json.loads(shown.splitlines()[-1])


def each_of(*programs: Program) -> pytest.MarkDecorator:
    """Runs a test with each of these clients."""
    ids = [program.key for program in programs]
    return pytest.mark.parametrize("client", programs, indirect=True, ids=ids)


def statuses(errors: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    """A client's exceptions: their classes, and the statuses that they name."""
    return {what: (error["class"], error["status"]) for what, error in errors.items()}


def run(
    program: str, *arguments: str, given: str = "", env: Mapping[str, str] | None = None
) -> str:
    """The output of a program of the clients' environment, which has to succeed."""
    if not (BIN / program).exists():
        raise FileNotFoundError(f"{BIN / program} is missing: `make test-clients` installs it")
    done = subprocess.run(
        [BIN / program, *arguments],
        input=given,
        env=environment(env or {}),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables for clients: none that name proxies or keys, and nothing is fetched or reported."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("PYTHON", "OPENAI", "VLLM"))
    }
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NODE_PATH": str(NODE_MODULES),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    return {**kept, **quiet, **more}


@cache
def installed(package: str) -> str:
    """The version of a distribution in the clients' environment."""
    code = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    return run("python", "-c", code, package).strip()


OPENAI = Program("openai (Python)", "openai", "openai_calls.py")
OPENAI_NODE = Program("openai (npm)", "openai", "openai_calls.cjs")
ANTHROPIC = Program("anthropic (Python)", "anthropic", "anthropic_calls.py")
ANTHROPIC_NODE = Program("@anthropic-ai/sdk (npm)", "@anthropic-ai/sdk", "anthropic_calls.cjs")
LITELLM = Program("litellm", "litellm", "litellm_calls.py")
LANGCHAIN = Program("langchain-openai", "langchain-openai", "langchain_calls.py")
INSPECT = Program("inspect-ai", "inspect-ai", "inspect_calls.py")
SAGEMAKER = Program("botocore (SageMaker runtime)", "botocore", "sagemaker_calls.py")
TRL = Program("TRL, AsyncGRPO's client", "trl", "trl_calls.py")

HASTY = tuple(
    each.key for each in (OPENAI, OPENAI_NODE, ANTHROPIC, ANTHROPIC_NODE, LITELLM, LANGCHAIN)
)
