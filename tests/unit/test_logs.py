"""The project's log lines go where vLLM's go, whenever vLLM decides where that is."""

import logging

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
