"""Requests without a valid key fill no log."""

import logging

from vllm_multilora.integration.server.access_log import (
    MOST_LINES,
    PERIOD_S,
    FewRefusals,
    keep_refusals_few,
)


def line(status: int) -> logging.LogRecord:
    """As uvicorn's."""
    args = ("127.0.0.1:1", "GET", "/v1/models", "1.1", status)
    return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s %s %s %s %d", args, None)


def test_few_refusals_are_logged_and_the_others_counted(caplog):
    now = 100.0
    few = FewRefusals(lambda: now)
    assert sum(few.filter(line(401)) for _ in range(1000)) == MOST_LINES
    assert all(few.filter(line(status)) for status in (200, 403, 404, 500) for _ in range(100))
    now += PERIOD_S
    with caplog.at_level(logging.WARNING):
        assert sum(few.filter(line(401)) for _ in range(5)) == 5
        now += PERIOD_S
        assert sum(few.filter(line(401)) for _ in range(MOST_LINES + 1)) == MOST_LINES
        now += PERIOD_S
        assert few.filter(line(401))
    assert [record.getMessage() for record in caplog.records] == [
        f"{1000 - MOST_LINES} more requests without a valid key came in the time before.",
        "1 more request without a valid key came in the time before.",
    ]


def test_lines_of_another_form_pass():
    few = FewRefusals()
    for args in (None, (), ({"a": 1},)):
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "hello", args, None)
        assert few.filter(record)


def test_uvicorns_logger_has_one_filter_however_often_it_is_asked_for():
    logger = logging.getLogger("uvicorn.access")
    before = list(logger.filters)
    try:
        keep_refusals_few()
        keep_refusals_few()
        assert sum(isinstance(known, FewRefusals) for known in logger.filters) == 1
    finally:
        logger.filters[:] = before
