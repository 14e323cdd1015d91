"""The project's log lines go where vLLM's go, whenever vLLM decides where that is."""

import logging
import subprocess
import sys

import pytest

from vllm_multilora.integration.logs import PrintableLines, join_vllm_logging


@pytest.mark.parametrize("name", ["vllm_multilora.config", "multilora_kernels.native"])
def test_lines_reach_a_handler_that_vllm_adds_later(name):
    vllm_logger = logging.getLogger("vllm")
    logger = logging.getLogger(name)
    level, lines = vllm_logger.level, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    join_vllm_logging()
    try:
        vllm_logger.addHandler(handler)
        vllm_logger.setLevel(logging.INFO)
        logger.debug("hidden")
        logger.info("shown")
        vllm_logger.setLevel(logging.ERROR)
        logger.info("hidden, too")
    finally:
        vllm_logger.removeHandler(handler)
        vllm_logger.setLevel(level)
    assert lines == ["shown"]


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ("resp_1", "resp_1"),
        ("客户 100 %\n\tsecond line", "客户 100 %\n\tsecond line"),
        ("\x1b[31mred\x9b0m\r\0", r"\x1b[31mred\x9b0m\r\x00"),
        ("a\u2028b\u202egnp.exe", r"a\u2028b\u202egnp.exe"),
    ],
    ids=["plain", "lines", "escapes", "separators"],
)
def test_what_a_client_chooses_is_nothing_but_text_in_the_log(chosen, shown):
    record = logging.makeLogRecord({"msg": "Received request %s: %d.", "args": (chosen, 1)})
    assert PrintableLines().filter(record)
    assert record.getMessage() == f"Received request {shown}: 1."


def test_nor_is_what_an_exception_repeats_of_it():
    """As vLLM logs what has failed with `logger.exception("Error in ...: %s", error)`."""
    error = ValueError("no role \x1b[31mred")
    found = {"msg": "Error: %s", "args": (error,), "exc_info": (ValueError, error, None)}
    record = logging.makeLogRecord(found)
    assert PrintableLines().filter(record)
    reported = r"no role \x1b[31mred"
    assert logging.Formatter().format(record) == f"Error: {reported}\nValueError: {reported}"


def test_what_cannot_be_reported_is_the_handlers_matter(monkeypatch, capsys):
    """Python says so on the standard error stream; whoever has logged it goes on."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = logging.StreamHandler()
    handler.addFilter(PrintableLines())
    handler.handle(logging.makeLogRecord({"msg": "%d tokens", "args": ("many",)}))
    assert "Logging error" in capsys.readouterr().err


CONFIGURATION = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
    "loggers": {"vllm": {"handlers": ["console"], "level": "INFO"}},
}
"""As of a file that names vLLM's logger only."""


@pytest.mark.parametrize(
    "configure",
    [
        "from logging.config import dictConfig as configure",
        "from uvicorn import Config; configure = lambda given: Config('app', log_config=given)",
    ],
    ids=["vllm", "uvicorn"],
)
def test_lines_go_on_when_a_file_is_taken_that_does_not_name_the_project(configure):
    """Python silences what is there and not named, unless the file says otherwise."""
    pytest.importorskip("uvicorn")
    code = f"""
import logging
from vllm_multilora.integration.logs import join_vllm_logging
{configure}
logger = logging.getLogger("vllm_multilora.config")
join_vllm_logging()
configure({CONFIGURATION!r})
join_vllm_logging()
logger.info("shown")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("shown\n", "")


def test_what_vllm_logs_passes_a_filter_whatever_handlers_it_gets_later():
    code = f"""
import logging
from logging.config import dictConfig
from vllm_multilora.integration.logs import add_filter, join_vllm_logging
add_filter(lambda record: record.getMessage() != "hidden")
dictConfig({CONFIGURATION!r})
join_vllm_logging()
for line in ("hidden", "shown"):
    logging.getLogger("vllm.entrypoints").info(line)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("shown\n", "")
