"""The server harness itself: a failed start is explained and leaves nothing behind."""

import multiprocessing
import os
import weakref
from pathlib import Path

import pytest

from .. import template
from ..models.cases import Scenario
from ..server import ServerStartError, VllmServer

pytestmark = pytest.mark.serving


def test_a_start_over_its_limit_shows_the_log_and_ends_the_group(
    llama: Scenario, tmp_path: Path
) -> None:
    server = VllmServer(
        llama.base, log=tmp_path / "vllm.log", start_timeout=0.5, new_interpreter=True
    )
    with pytest.raises(ServerStartError, match=r"not healthy after 0\.5 s.*vllm\.log"), server:
        pytest.fail("no server starts that fast")
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)


def test_a_server_that_ends_at_once_shows_its_last_words(llama: Scenario, tmp_path: Path) -> None:
    server = VllmServer(llama.base, "--no-such-flag", log=tmp_path / "vllm.log")
    with pytest.raises(ServerStartError, match=r"(?s)ended with status 2.*--no-such-flag"), server:
        pytest.fail("an unknown flag is no reason to start")


def finalize_at_the_end(file: Path) -> None:
    weakref.finalize(finalize_at_the_end, file.write_text, "finalized")


def test_a_forked_process_ends_as_a_new_interpreter_does(tmp_path: Path) -> None:
    """So end vLLM's engines, and the folders of their metrics."""
    with template.forked_processes():
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=finalize_at_the_end, args=(tmp_path / "file",))
        process.start()
        process.join(120)
    assert process.exitcode == 0
    assert (tmp_path / "file").read_text() == "finalized"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), r"store: others can get at it \(mode 755\), expected 700; name a folder that only"),
        (("--multilora-tenants", "/none.yaml"), "/none.yaml: cannot read the tenants: No such"),
        (("--multilora-cache-policy", "nope"), "unknown cache policy 'nope'"),
    ],
    ids=["store-folder", "tenants", "policy"],
)
def test_a_wrong_setting_stops_the_start_with_one_sentence(
    llama: Scenario, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    env = {} if arguments else {"MULTILORA_STORE_FOLDER": str(folder)}
    server = VllmServer(llama.base, "--enable-lora", *arguments, log=tmp_path / "vllm.log", env=env)
    with pytest.raises(ServerStartError, match=f"vllm serve: error: .*{said}.*$"), server:
        pytest.fail("this setting is wrong")
    assert "Traceback" not in server.log.read_text()
