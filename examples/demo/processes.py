"""The demo's child processes: started with a log file each, and stopped whatever happens."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_STOP_LIMIT_S = 10
_SHOWN_LINES = 30


@dataclass(frozen=True)
class Child:
    """A running child process.

    Attributes:
        name: what messages call it.
        process: the process; it leads a process group of its own.
        log: the file that its standard error goes to.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path

    def fail(self, what: str) -> NoReturn:
        """Ends the demo with the end of the child's log.

        Args:
            what: what is wrong with the child, after its name.

        Raises:
            SystemExit: always.
        """
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
        raise SystemExit(f"{self.name} {what}; {self.log} ends with:\n{tail}")

    def check(self) -> None:
        """Ends the demo if the child has ended.

        Raises:
            SystemExit: the child has ended.
        """
        if self.process.poll() is not None:
            self.fail(f"ended with status {self.process.returncode}")


@contextmanager
def started(name: str, command: list[str], **options: Any) -> Iterator[Child]:
    """Runs a command beside the body and stops it afterwards, with all of its own children.

    Args:
        name: what messages call it, also the beginning of its log file's name.
        command: the program and its arguments.
        options: further arguments of `subprocess.Popen`.

    Yields:
        The child. Its log file stays where the body ends with an exception.
    """
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command, stderr=log, text=True, start_new_session=True, **{"stdout": log, **options}
        )
    child = Child(name, process, Path(log.name))
    try:
        yield child
    finally:
        _stop(process)
    child.log.unlink()


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_LIMIT_S)
    with suppress(ProcessLookupError):  # Nothing of its group is left, as it should be.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
