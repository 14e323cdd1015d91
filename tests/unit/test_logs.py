"""The project's log lines go where vLLM's go, whenever vLLM decides where that is."""

import logging
import subprocess
import sys

import pytest

from vllm_multilora.integration.logs import join_vllm_logging


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


def test_lines_go_on_when_vllm_takes_a_file_that_names_its_own_logger_only():
    """Python silences what is there and not named, unless the file says otherwise."""
    code = """
import logging
from logging.config import dictConfig
from vllm_multilora.integration.logs import configure_loggers, join_vllm_logging
logger = logging.getLogger("vllm_multilora.config")
join_vllm_logging()
console = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}
loggers = {"vllm": {"handlers": ["console"], "level": "INFO"}}
configure_loggers(dictConfig, {"version": 1, "handlers": {"console": console}, "loggers": loggers})
logger.info("shown")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("shown\n", "")
