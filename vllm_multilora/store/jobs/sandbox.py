"""Confines a job that reads an untrusted file; all of it applies to the calling process.

Memory, time and files are limited everywhere. With Landlock, the job can read only below the
allowed roots (anywhere, if there are none) and write nowhere. With seccomp, it can make no
connection, start no program and no process, and touch no other process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import signal
import stat
import struct
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from vllm_multilora.store.memory import syscalls
from vllm_multilora.store.protocol.channel import MAX_DESCRIPTORS

MAX_MEMORY = 1 << 30
"""Bytes of its own that a job may take beside what the store had; the pack is not counted."""

_MAX_FILES = MAX_DESCRIPTORS + 64  # the segments that a pack lies in; and its own

_FILES_IN_MEMORY = ("memfd_create",)  # system calls that making such files takes

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP = 1, 22
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_SECCOMP_MODE_FILTER = 2
_CLONE_THREAD = 0x00010000

# Landlock's rights by the version that brought them; see the kernel's userspace-api/landlock.
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))  # (version, rights known then)
_EXECUTE, _CONNECT = 1, 2
_NET_RIGHTS = 0b11  # bind and connect of TCP, since version 4
_SCOPES = 0b11  # abstract sockets and signals, since version 6
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_CREATE_RULESET_VERSION = 1


def enter(allowed_roots: Sequence[str], timeout_s: float, *, files_in_memory: bool = False) -> None:
    """Restricts this process for the rest of its life.

    Args:
        allowed_roots: Folders below which files may be read; empty: anywhere.
        timeout_s: Seconds of processor time that it may take.
        files_in_memory: Whether it may make files in memory, as those that read pickles do.

    Raises:
        OSError: The kernel has Landlock, and does not apply it.
    """
    tempfile.tempdir = os.sep  # libraries that PyTorch imports look for one, by writing
    # CUDA builds of PyTorch have `ctypes` look for a library. Were there a compiler, it would ask
    # that, which cannot be started, by way of a file, which cannot be written.
    os.environ["PATH"] = ""
    syscalls.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _limit(timeout_s, MAX_MEMORY if files_in_memory else 0)
    with contextlib.suppress(OSError):  # no Linux
        # Where memory is used up, of a container say, the kernel ends a job, and none who serve.
        Path("/proc/self/oom_score_adj").write_text("1000")
    if syscalls.libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        try:
            roots = (*allowed_roots, *code_paths()) if allowed_roots else ("/",)
            enter_landlock(roots)
        except OSError as error:
            message = f"the kernel has Landlock, and does not apply it to a check: {error.strerror}"
            raise OSError(error.errno, message) from error
        # Where the kernel has no seccomp, Landlock holds: `protection` says so.
        with contextlib.suppress(OSError):
            _enter_seccomp(_FILES_IN_MEMORY if files_in_memory else ())


def prepare() -> None:
    """Works out what each job's `enter` needs, once for all of those that this process forks."""
    code_paths()
    landlock_version()
    for allowed in ((), _FILES_IN_MEMORY):
        _program(allowed)


def protection() -> list[str]:
    """What protects jobs on this machine, one phrase each."""
    found = ["limits of time, memory and files"]
    if syscalls.libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) < 0:
        return found  # a filter around this process forbids what the rest begins with
    if version := landlock_version():
        found.append(f"Landlock (version {version})")
    if syscalls.audit_arch() is not None and _takes_filters():
        found.append("seccomp")
    return found


def _takes_filters() -> bool:
    """Whether the kernel, or what stands in for it, has seccomp: it looks for a filter then."""
    result = syscalls.libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return bool(result < 0 and ctypes.get_errno() == errno.EFAULT)


@functools.cache
def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0: none."""
    try:
        return syscalls.call(
            syscalls.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def _limit(timeout_s: float, file_bytes: int) -> None:
    # The signal of the lower limit says why the job ended; that of the upper one does not, and
    # cannot be ignored.
    _lower(resource.RLIMIT_CPU, cpu_limit_s(timeout_s), cpu_limit_s(timeout_s) + 1)
    _lower(resource.RLIMIT_DATA, _own_memory() + MAX_MEMORY)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, _MAX_FILES)


def cpu_limit_s(timeout_s: float) -> int:
    """Seconds of processor time that a job has."""
    return int(timeout_s) + 1


def _lower(what: int, limit: int, upper: int | None = None) -> None:
    upper = limit if upper is None else upper
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        limit, upper = min(limit, hard), min(upper, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(what, (limit, upper))


def _own_memory() -> int:
    """Bytes that this process holds already and that RLIMIT_DATA counts."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def enter_landlock(
    readable: Sequence[str], writable: Sequence[str] = (), ports: Sequence[int] = ()
) -> None:
    """Limits this process to what is below some paths, and to TCP connections to some ports."""
    version = landlock_version()
    if not version:
        return
    rights = max(count for since, count in _FILE_RIGHTS if since <= version)
    fields = [(1 << rights) - 1]
    if version >= 4:
        fields.append(_NET_RIGHTS)
    if version >= 6:
        fields.append(_SCOPES)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    ruleset = syscalls.call(syscalls.LANDLOCK_CREATE_RULESET, attributes, size, ctypes.c_uint32(0))
    for root in readable:
        _allow(ruleset, root, _READ_FILE | _READ_DIR)
    for root in writable:
        _allow(ruleset, root, fields[0] & ~_EXECUTE)
    _allow(ruleset, os.devnull, _READ_FILE | _WRITE_FILE)
    for port in ports if version >= 4 else ():
        _add(ruleset, _RULE_NET_PORT, struct.pack("=QQ", _CONNECT, port))
    syscalls.call(syscalls.LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Allows what is below a path; one that cannot be opened gives no right."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= ~_READ_DIR
        _add(ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor))
    finally:
        os.close(descriptor)


def _add(ruleset: int, kind: int, rule: bytes) -> None:
    syscalls.call(syscalls.LANDLOCK_ADD_RULE, ruleset, kind, rule, ctypes.c_uint32(0))


@functools.cache
def code_paths() -> tuple[str, ...]:
    """Where code lies that Python may import late (PyTorch, for pickles); it is no secret."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
    devices = ("/dev/urandom", "/proc/cpuinfo")  # PyTorch starts with these
    own = str(Path(__file__).parents[2])
    torch = find_spec("torch")  # a virtual environment may see that of another place
    beside = str(Path(torch.origin).parents[1]) if torch and torch.origin else own
    paths = [*map(sysconfig.get_path, names), *libraries, *devices, own, beside]
    return tuple(dict.fromkeys(paths))


def _enter_seccomp(allowed: tuple[str, ...]) -> None:
    """Forbids system calls by a filter: they fail with EPERM.

    A process that the job starts would outlive it, and write into memory that is others' by then.
    Threads end with the job; what `clone3` is to start is out of a filter's sight, so that it is
    unknown here, and libraries start their threads by `clone`.
    """
    program = _program(allowed)
    if program is None:
        return
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    result = syscalls.libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0
    )
    if result != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


@functools.cache
def _program(allowed: tuple[str, ...]) -> bytes | None:
    """The filter's program; None: this machine's system calls are not known here."""
    arch = syscalls.audit_arch()
    if arch is None:
        return None
    return _filter(arch, syscalls.numbers_of_forbidden(allowed), syscalls.clone())


def _filter(arch: int, forbidden: Sequence[int], clone: int) -> bytes:
    """A program of classic BPF over `struct seccomp_data` (number at 0, machine at 4, flags at 16).

    Args:
        arch: The kernel's number of this machine's kind.
        forbidden: Numbers of system calls.
        clone: The number of the one that is allowed for threads only.
    """
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO
    step: Callable[..., bytes] = struct.Struct("HBBI").pack
    refused = len(forbidden) + 10  # the last step
    program = [
        step(load, 0, 0, 4),
        step(equal, 0, refused - 2, arch),  # another table of numbers (32 bits): all refused
        step(load, 0, 0, 0),
        step(at_least, refused - 4, 0, 0x40000000),  # x32
        step(equal, 0, 1, syscalls.CLONE3),
        step(give, 0, 0, fail | errno.ENOSYS),
        *(step(equal, refused - at - 1, 0, number) for at, number in enumerate(forbidden, 6)),
        step(equal, 0, 2, clone),
        step(load, 0, 0, 16),
        step(has_bits, 0, 1, _CLONE_THREAD),
        step(give, 0, 0, allow),
        step(give, 0, 0, fail | errno.EPERM),
    ]
    return b"".join(program)
