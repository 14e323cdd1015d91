"""Linux system call numbers by machine, how to make a call, and a mapping as a call makes it."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
CLONE3 = 435

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
# The kernel's name of the call, x86-64's number, arm64's (the generic table; None: it has none).
_NUMBERS: dict[str, tuple[int, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "mq_open": (240, 180),
    "ftruncate": (77, 46),
}

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def call(number: int, *arguments: object) -> int:
    """Makes a system call; raises OSError where it fails."""
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@contextmanager
def mapped(descriptor: int, offset: int, size: int) -> Iterator[int]:
    """Maps a range of host memory to be written to, and gives its address; raises OSError.

    The descriptor may be closed at once. `mmap.mmap` would keep a copy of it for each mapping. All
    pages are mapped by this call: a fault for each of them would cost several times as much.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    address = libc.mmap(None, size, protection, flags, descriptor, offset)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        what = f"{size} bytes of host memory cannot be mapped: {os.strerror(code)}"
        raise OSError(code, what)
    try:
        yield address
    finally:
        libc.munmap(address, size)


def audit_arch() -> int | None:
    """The kernel's number of this machine's kind; None: its system calls are not known here."""
    return _AUDIT_ARCH.get(platform.machine())


def clone() -> int:
    """This machine's number of the system call that starts threads, and processes."""
    return _CLONE[platform.machine()]


def numbers_of_forbidden(allowed: Sequence[str] = ()) -> list[int]:
    """System calls that a job has no use for, but for those named, in this machine's numbers."""
    column = list(_AUDIT_ARCH).index(platform.machine())
    found = (numbers[column] for name, numbers in _NUMBERS.items() if name not in allowed)
    return sorted(number for number in found if number is not None)
