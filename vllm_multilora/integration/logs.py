"""Sends this project's log lines to vLLM's log."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from itertools import product

from vllm_multilora.wording import CONTROLS, printable

_PROJECT = ("vllm_multilora", "multilora_kernels")

_filters: list[logging.Filter] = []


class PrintableLines(logging.Filter):
    """Escapes control characters: clients choose requests' ids, and more, that vLLM may log.

    Line breaks stay. vLLM begins each line as it does the first.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged: all are."""
        # Who logs what cannot be told is told so by the handler, and must not fail for it here.
        with suppress(Exception):
            if CONTROLS.search(text := record.getMessage()):
                record.msg, record.args = CONTROLS.sub(_escaped, text), None
            if record.exc_info and not record.exc_text:
                traceback = logging.Formatter().formatException(record.exc_info)
                if CONTROLS.search(traceback):
                    record.exc_text = CONTROLS.sub(_escaped, traceback)
        return True


def _escaped(found: re.Match[str]) -> str:
    control = found.group()
    return control if control in "\n\t" else printable(control)


def join_vllm_logging() -> None:
    """Makes the project's loggers children of vLLM's; safe to call again.

    They have its handlers and its level from then on, whenever vLLM sets them: newer versions do
    so long after they have loaded their plugins. A process calls it again once it has taken its
    logging configuration: a file silences all loggers that it does not name, unless it says
    otherwise, and brings handlers without the filters of this module.
    """
    vllm_logger = logging.getLogger("vllm")
    for name in _PROJECT:
        logging.getLogger(name).parent = vllm_logger
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.partition(".")[0] in _PROJECT:
            known.disabled = False
    _filter()


def add_filter(lines: logging.Filter) -> None:
    """Has what vLLM logs in this process pass a filter from now on."""
    if lines not in _filters:
        _filters.append(lines)
    _filter()


def _filter() -> None:
    # Loggers' own filters see nothing of what comes from the loggers below them.
    for handler, lines in product(logging.getLogger("vllm").handlers, _filters):
        handler.addFilter(lines)
