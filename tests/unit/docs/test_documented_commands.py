"""Every command in the README and the docs is run by a test, or it is said here why it is not.

`vllm-multilora` commands are also parsed, `vllm serve` commands up to their `--multilora` flags;
targets of `make` and flags of scripts exist.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.adapters.checkpoints import MODULES, weights, write
from tests.unit.docs.test_docs import FENCED, PAGES, ROOT
from tests.unit.docs.test_examples import settings_of
from vllm_multilora.cli import main, parser_of

PROGRAMS = {
    "apt", "curl", "docker", "git", "kubectl", "make", "openssl", "pip", "prometheus", "promtool",
    "python", ".venv/bin/python", "vllm", "vllm-multilora",
}  # fmt: skip
PLACEHOLDERS = {
    "[--": "--", "]": "", "...": "", " N": " 16", " SECONDS": " 60", "new | hash | check": "check"
}  # fmt: skip
"""What stands for something else, and something that may be typed in its place."""

TESTS = {
    "python -m tools.seams": "tests/tools/test_seams.py::test_the_command_prints_every_number",
    "python -m tools.words": "tests/tools/test_words.py::"
    "test_the_command_names_what_must_be_rewritten",
    "curl": "tests/serving/names/test_registration.py::"
    "test_the_calls_of_the_docs_load_an_adapter_ask_it_and_unload_it",
    "make demo": "tests/serving/examples/test_demo.py::"
    "test_the_demo_shows_all_its_parts_and_leaves_nothing_running",
    "make dist-check": "tests/unit/test_packaging.py::test_pip_finds_nothing_amiss_with_it",
    "make dist": "tests/unit/test_packaging.py::test_the_sdist_holds_what_the_wheel_is_built_from",
    "pip install .": "tests/unit/test_packaging.py::test_vllm_sees_an_installed_wheel",
    "openssl": "tests/unit/docs/test_documented_commands.py::"
    "test_the_keys_of_the_docs_sign_and_verify",
    "promtool": "tests/monitoring/test_monitoring.py::"
    "test_prometheus_takes_the_files_and_the_rules_hold",
    "prometheus": "tests/monitoring/test_monitoring.py::"
    "test_prometheus_takes_the_files_and_the_rules_hold",
    "vllm bench serve": "tests/serving/names/test_named_adapters.py",
    "vllm launch render": "tests/tenants/test_access.py",
    "vllm run-batch": "tests/serving/names/test_named_adapters.py",
    "python examples/activated/shared_context.py": "tests/serving/kinds/test_activated_example.py",
    "python -m benchmarks list": "tests/unit/docs/test_benchmarks.py::"
    "test_each_says_what_it_measures",
    "python -m benchmarks report": "tests/unit/docs/test_benchmarks.py::"
    "test_the_page_is_made_of_the_results",
    "python -m tools.kernels.bench": "tests/tools/kernels/test_bench.py::"
    "test_without_a_gpu_the_command_measures_the_cpu_and_says_so",
    "python -m tools.kernels.model": "tests/tools/kernels/test_model.py::"
    "test_the_command_gives_every_case_of_every_layer_as_modelled",
    "python -m tools.kernels.report": "tests/tools/kernels/test_triton_report.py::"
    "test_everything_asked_for_was_compiled",
    "python -m tools.kernels.ranks": "tests/tools/test_ranks.py::"
    "test_a_part_of_the_table_is_what_the_compiler_makes",
    "python -m tools.kernels.loops": "tests/tools/kernels/test_loops.py::"
    "test_the_page_shows_the_main_loops_that_the_compiler_makes",
    "python -m tools.gpu.vllm_kernels": "tests/tools/test_vllm_kernels.py::"
    "test_carried_kernels_need_nothing_else_of_vllm_and_are_right",
    "python -m tools.kernels.tune": "tests/tools/kernels/test_tune.py::"
    "test_a_dry_run_lists_candidates_and_timings",
    "python -m tools.kernels.work": "tests/tools/kernels/test_work.py::"
    "test_the_table_shows_ratios_to_the_first",
    "python -m tools.pages": "tests/unit/docs/test_docs.py::test_tables_are_those_of_the_code",
    "python -m tools.testbed.compatibility": "tests/tools/test_testbed.py::"
    "test_the_page_is_up_to_date",
    "python -m vllm_multilora.store": "tests/store/test_store.py::"
    "test_a_store_is_up_soon_and_small",
    ".venv/bin/python -m pytest tests/serving/bases/test_parity.py": "tests/serving/bases/"
    "test_parity.py",
    "vllm serve": "tests/serving/http/test_plugin.py::test_the_flags_are_on_vllm_serve",
    "python -m dynamo.vllm": "examples/dynamo/test_dynamo.py",
    "vllm-multilora adapters": "tests/operations/test_adapters_command.py",
    "vllm-multilora advise": "tests/operations/test_advise_command.py",
    "vllm-multilora digest": "tests/adapters/signing/test_signatures.py",
    "vllm-multilora doctor": "tests/serving/http/test_plugin.py::"
    "test_the_doctor_finds_everything_in_place",
    "vllm-multilora doctor --against": "tests/unit/patching/test_against.py",
    "vllm-multilora calibrate": "tests/capacity/test_calibrate_command.py",
    "vllm-multilora plan": "tests/planning/test_plan_command.py",
    "vllm-multilora plan --traffic": "tests/capacity/test_plan_traffic.py",
    "vllm-multilora sign": "tests/adapters/signing/test_signatures.py",
    "vllm-multilora simulate": "tests/commands/test_simulate.py",
    "vllm-multilora status": "tests/operations/test_status_command.py",
    "vllm-multilora store": "tests/store/test_store_command.py",
    "vllm-multilora tenants": "tests/tenants/test_tenants_command.py",
    "vllm-multilora validate": "tests/adapters/checks/test_validate_command.py",
    "vllm-multilora verify": "tests/adapters/signing/test_signatures.py",
}
"""How commands begin, and what runs them: a test, or all of a file."""

UNTESTED = {
    "apt install": "needs root; the same package's promtool is run by tests/monitoring",
    "docker": "needs Docker, and a GPU; tests/unit/docs/test_examples.py reads the files",
    "git clone": "this is a clone",
    "kubectl": "needs a cluster; tests/unit/docs/test_examples.py reads the files",
    "make coverage": "is the tests themselves",
    "make docs": "runs beside these tests, as a part of make test",
    "make dynamo": "installs Dynamo, which these tests do without; make test-dynamo runs its parts",
    "make test-dynamo": "is the tests of the example",
    "make ray": "installs Ray, which these tests do without; make test-ray runs its parts",
    "make test-ray": "is the tests of the example",
    "make test-clients": "installs clients from other projects, and is tests itself",
    "make help": "prints a part of the Makefile",
    "make install": "is what these tests run in",
    "make lint": "runs beside these tests, as a part of make test",
    "make test": "is the tests themselves",
    "make TORCH_INDEX=": "is make install with another index",
    "pip install --editable": "is what these tests run in",
    "pip install '.[": "an extra draws packages in from an index, as make install does",
    "pip install --no-deps ./packaging/": "make install does it for these tests",
    "pip uninstall": "takes away what these tests run in",
    "python -m benchmarks run": "measures, for minutes and on a quiet machine; "
    "tests/unit/docs/test_benchmarks.py runs a short one",
    "python check.py": "takes three minutes; its parts are tested in tests/monitoring",
    "python -m sglang.launch_server": "is another server's",
    "python -m tools.page_screenshots": "makes a picture of the demo's server; the page itself "
    "is in tests/status_page",
    "python -m tools.kernels.launch_cost": "measures, for minutes and on a quiet machine",
}
"""How commands begin, and why no test runs them."""


def commands(page: Path) -> list[str]:
    """Commands in fenced blocks and between backticks, without variables and comments."""
    text = page.read_text()
    lines = []
    for block in FENCED.findall(text):
        lines += block.replace("\\\n", " ").splitlines()[1:-1]
    lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    found = []
    for line in lines:
        for command in re.split(r" && ", re.split(r"\s#\s|\s{3,}#", line)[0]):
            command = re.sub(r"^\$ ", "", " ".join(command.split()))
            command = re.sub(r"^([A-Z_]+=\S* )+", "", command)
            if command.partition(" ")[0] in PROGRAMS and " " in command:
                found.append(command)
    return found


COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:50]}")
    for page in PAGES
    if page.name != "CHANGELOG.md"
    for command in dict.fromkeys(commands(page))
]


def entry(command: str) -> str | None:
    """The longest beginning of a command that is in one of the tables."""
    return max(
        (each for each in TESTS | UNTESTED if command.startswith(each)), key=len, default=None
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_run_by_a_test_or_has_a_reason(command: str) -> None:
    assert entry(command), "add it to TESTS, or to UNTESTED with a reason"


def test_both_tables_speak_of_commands_that_are_documented() -> None:
    assert set(TESTS | UNTESTED) == {entry(param.values[0]) for param in COMMANDS}


@pytest.mark.parametrize("test", sorted(set(TESTS.values())))
def test_the_test_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert (ROOT / path).is_file()
    assert f"def {name}" in (ROOT / path).read_text()


@pytest.mark.parametrize("command", [each for each in COMMANDS if "vllm" in each.values[0]])
def test_its_arguments_are_right(command: str) -> None:
    if command.startswith("vllm serve"):
        settings_of([word for word in shlex.split(command) if word not in ("...", "MODEL")])
    elif command.startswith("vllm-multilora"):
        for placeholder, value in PLACEHOLDERS.items():
            command = command.replace(placeholder, value)
        words = shlex.split(command)[1:]
        if words[1:] or words[0] in ("doctor", "store"):
            assert parser_of(words[:1]).parse_args(words).run


@pytest.mark.parametrize("command", [each for each in COMMANDS if "python " in each.values[0]])
def test_its_script_has_the_flags(command: str) -> None:
    module, script = re.search(r"python (?:-m (\S+)|(\S+))", command).groups()
    if module and module.partition(".")[0] not in ("tools", "vllm_multilora"):
        return
    path = ROOT / (script or module.replace(".", "/"))
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    text = (path if path.is_file() else ROOT / "examples/monitoring" / path.name).read_text()
    for flag in re.findall(r"--[a-z-]+", command):
        assert f'"{flag}"' in text


def test_make_has_the_targets() -> None:
    rules = (ROOT / "Makefile").read_text()
    for param in COMMANDS:
        command = param.values[0]
        if command.startswith("make ") and "=" not in command.split()[1]:
            assert re.search(rf"^{command.split()[1]}:", rules, re.M), command


def test_the_keys_of_the_docs_sign_and_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DIR").mkdir()
    write(tmp_path / "DIR", weights({MODULES[0][0]: 4}), rank=4, alpha=8)
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "docs/identity.md").read_text().splitlines()
    [openssl] = [line for line in lines if line.startswith("openssl ")]
    subprocess.run(openssl, shell=True, check=True, capture_output=True)
    assert main(["sign", "DIR", "--key", "signing.key"]) == 0
    assert main(["verify", "DIR", "--keys", "signing.pub"]) == 0
