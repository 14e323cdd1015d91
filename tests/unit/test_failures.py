"""Which kind of failure an error is: clients get their status by it, and retries their pause."""

import errno
from http import HTTPStatus

import pytest
from vllm import exceptions
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError

from vllm_multilora.failures import FailureKind, classify_failure, describe_failure
from vllm_multilora.integration.failed_requests import STATUS
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.requests import callers


class DeclaredError(OSError):
    failure_kind = FailureKind.QUARANTINED


class MutteringError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def circular() -> OSError:
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(FileNotFoundError("x"), FailureKind.GONE, id="no file"),
        pytest.param(NotADirectoryError("x"), FailureKind.GONE, id="a file for a folder"),
        pytest.param(PermissionError("x"), FailureKind.UNREADABLE, id="not allowed"),
        pytest.param(OSError(errno.EIO, "x"), FailureKind.UNREADABLE, id="a broken disk"),
        pytest.param(OSError(errno.ENOMEM, "x"), FailureKind.NO_MEMORY, id="the system's memory"),
        pytest.param(MemoryError(), FailureKind.NO_MEMORY, id="Python's memory"),
        pytest.param(TimeoutError("x"), FailureKind.TIMEOUT, id="too late"),
        pytest.param(ValueError("x"), FailureKind.INVALID, id="a wrong file"),
        pytest.param(KeyError("x"), FailureKind.INTERNAL, id="a fault of the software"),
        pytest.param(DeclaredError("x"), FailureKind.QUARANTINED, id="an error that says so"),
        pytest.param(
            caused(OSError("read failed"), FileNotFoundError("x")), FailureKind.GONE, id="by cause"
        ),
        pytest.param(
            caused(OSError("read failed"), MemoryError()), FailureKind.NO_MEMORY, id="by memory"
        ),
        pytest.param(
            caused(ValueError("x"), FileNotFoundError("x")),
            FailureKind.INVALID,
            id="causes count for errors of the system only",
        ),
        pytest.param(circular(), FailureKind.UNREADABLE, id="causes in a circle"),
    ],
)
def test_an_error_is_of_the_kind_that_a_client_can_act_on(error, kind):
    assert classify_failure(error) is kind


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("rank is 8"), "rank is 8"),
        (MemoryError(), "MemoryError"),
        (MutteringError(), "MutteringError"),
    ],
)
def test_a_failure_always_has_words(error, text):
    assert describe_failure(error) == text


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(LoRAAdapterNotFoundError("acme", "/adapters/acme"), id="404"),
        pytest.param(VLLMValidationError("wrong"), id="400"),
        *(
            pytest.param(kind("later"), id="503")
            for name, kind in vars(exceptions).items()
            if name == "RetryableRequestError"  # vLLM 0.31 has none
        ),
        pytest.param(RuntimeError("broken"), id="500"),
    ],
)
def test_an_answer_has_the_type_that_vllm_gives_such_errors(error):
    answer = create_error_response(error).error
    status = HTTPStatus(answer.code)
    assert registration.error_response(status, "of an adapter").error.type == answer.type
    assert callers.error_response(status, "of a caller").error.type == answer.type


def test_every_failure_has_a_type():
    assert callers.TYPES.keys() >= {*STATUS.values()}
