"""Every entry of the ledger names a handler that is there, and says what it is for."""

import ast
from pathlib import Path

import pytest

import vllm_multilora.integration
from vllm_multilora.integration.patching.tables.ledger import PATCHES

FOLDER = Path(vllm_multilora.integration.__file__).parent


def test_names_and_targets_are_unique():
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_handler_is_there_and_takes_the_original_first(patch):
    # Read, not imported: most of them import vLLM.
    module, _, name = patch.handler.partition(":")
    source = (FOLDER / f"{module.replace('.', '/')}.py").read_text()
    functions = {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert functions[name].args.args[0].arg == "original"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_an_entry_says_why_and_what_its_target_takes(patch):
    assert patch.why
    assert patch.until
    assert patch.takes
    assert all(patch.part.is_tested(run.partition("/")[0]) for run in patch.checked)
