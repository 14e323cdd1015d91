"""What a job cannot do, whatever a hostile file makes of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_multilora.store.jobs import sandbox
from vllm_multilora.store.protocol.channel import MAX_DESCRIPTORS

pytestmark = pytest.mark.waits

needs_landlock = pytest.mark.skipif(not sandbox.landlock_version(), reason="no Landlock here")
needs_seccomp = pytest.mark.skipif("seccomp" not in sandbox.protection(), reason="no seccomp here")

ENTER = """
import ctypes, errno, os, resource, signal, socket, subprocess, sys, threading
from vllm_multilora.store.jobs import sandbox
from vllm_multilora.store.memory import syscalls
roots = sys.argv[1:]
pair = socket.socketpair()
sandbox.enter(roots, 5.0)
"""


def run(code: str, *roots: str, before: str = "") -> subprocess.CompletedProcess:
    code = ENTER.replace("sandbox.enter", before + "sandbox.enter") + code
    return subprocess.run(
        [sys.executable, "-c", code, *roots], capture_output=True, text=True, timeout=60
    )


def refused(code: str, *roots: str, before: str = "") -> str:
    """The error that code ends with in the sandbox."""
    done = run(code, *roots, before=before)
    assert done.returncode == 1, done
    return done.stderr.strip().splitlines()[-1]


def assert_all_refused(codes: list[str], *roots: str) -> None:
    """The sandbox permits none of these, one after the other in one process."""
    tried = "".join(
        f"try:\n    {code}\nexcept PermissionError:\n    print('refused')\n" for code in codes
    )
    done = run(tried, *roots)
    assert done.stdout == "refused\n" * len(codes), done


@pytest.fixture
def root(tmp_path):
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret")
    return str(tmp_path / "allowed")


@needs_landlock
def test_files_below_the_roots_can_be_read(root):
    assert run("print(open(sys.argv[1] + '/file').read())", root).stdout == "inside\n"


@needs_landlock
def test_nothing_else_can_be_read(root):
    paths = "/etc/passwd", f"{root}/../secret", f"{root}/link", "/proc/1/environ"
    assert_all_refused([f"open({path!r}).read()" for path in paths], root)


@needs_landlock
@pytest.mark.parametrize("name", ["missing", "file/below a file", "loop"])
def test_a_root_that_cannot_be_opened_gives_no_right(root, name):
    Path(root, "loop").symlink_to("loop")
    assert "PermissionError" in refused("open('/etc/passwd').read()", f"{root}/{name}")
    code = "print(open(sys.argv[2] + '/file').read())"
    assert run(code, f"{root}/{name}", root).stdout == "inside\n"


@needs_landlock
def test_without_roots_everything_can_be_read_and_nothing_written(root, tmp_path):
    assert run("print(len(open('/etc/passwd').read()) > 0)").stdout == "True\n"
    codes = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.unlink({root + '/file'!r})",
        f"os.symlink('/', {root + '/new'!r})",
    ]
    assert_all_refused(codes)


@needs_landlock
@pytest.mark.skipif(sandbox.landlock_version() < 3, reason="no such Landlock here")
def test_no_file_is_made_shorter(root):
    assert "PermissionError" in refused("os.truncate(sys.argv[1] + '/file', 0)", root)


@needs_landlock
def test_what_is_written_to_nowhere_may_be_written(root):
    assert run("open(os.devnull, 'r+b').write(b'x'); print('written')", root).stdout == "written\n"


@needs_landlock
def test_modules_can_be_imported_late_whatever_the_roots_are(root):
    assert run("import colorsys, safetensors; print('imported')", root).stdout == "imported\n"


@needs_landlock
def test_pytorch_can_be_imported_late_wherever_it_is_installed(root, tmp_path):
    package = tmp_path / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import beside_torch")
    (tmp_path / "elsewhere" / "beside_torch.py").write_text("print('imported')")
    done = run("import torch", root, before=f"sys.path.insert(0, {str(package.parent)!r})\n")
    assert done.stdout == "imported\n", done.stderr


@needs_landlock
def test_whoever_looks_for_a_library_goes_on_without(root, tmp_path, monkeypatch):
    """As CUDA builds of PyTorch do when they are imported; a compiler would be asked."""
    (tmp_path / "gcc").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("import ctypes.util; print(ctypes.util.find_library('dl'))", root)
    assert done.stdout == "None\n", done.stderr


@needs_seccomp
def test_no_connection_no_program_no_other_process():
    assert_all_refused(
        [
            "socket.socket(socket.AF_INET)",
            "socket.socket(socket.AF_UNIX)",
            "socket.socketpair()",
            "pair[0].connect('/tmp/x')",
            "os.execv('/bin/true', ['true'])",
            "subprocess.run(['/bin/true'])",
            "os.kill(os.getppid(), 0)",
            "os.pidfd_open(os.getppid())",
            "os.memfd_create('x')",
            "os.fork()",
            "syscalls.call(syscalls.clone(), signal.SIGCHLD, 0, 0, 0, 0)",
            "os.ftruncate(pair[0].fileno(), 0)",
        ]
    )


@needs_seccomp
def test_other_tables_of_system_calls_are_no_way_around():
    """Tries the tables for x32 and for 32 bits, which a kernel may lack."""
    assert "PermissionError" in refused("syscalls.call(0x40000000 + 39)")
    if os.uname().machine == "x86_64":
        code = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000 cd80 c3"))  # getpid, by `int 0x80`
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
        done = run(code)
        assert done.stdout == "-1\n" or done.returncode == -signal.SIGSEGV, done


@needs_landlock
@pytest.mark.parametrize(
    ("since", "code"),
    [
        (4, "socket.socket().connect(('127.0.0.1', 9))"),
        (4, "socket.socket().bind(('127.0.0.1', 0))"),
        (6, "socket.socket(socket.AF_UNIX).connect(other.getsockname())"),
        (6, "os.kill(os.getppid(), 0)"),
    ],
)
def test_where_there_is_no_seccomp_landlock_holds(since, code):
    if sandbox.landlock_version() < since:
        pytest.skip("no such Landlock here")
    before = """
other = socket.socket(socket.AF_UNIX)
other.bind("")  # to a name that is no file's
other.listen()
sandbox._enter_seccomp = lambda allowed: None
"""
    assert "PermissionError" in refused(code, before=before)


@needs_seccomp
def test_libraries_do_not_start_threads_by_what_would_start_processes_too():
    assert "Function not implemented" in refused("syscalls.call(syscalls.CLONE3, None, 0)")


@needs_seccomp
def test_what_a_job_needs_goes_on():
    code = """
pair[0].send(b'x'); print(pair[1].recv(1))
thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()
import numpy; print(numpy.ones((300, 300)).dot(numpy.ones((300, 300))).sum())
"""
    assert run(code).stdout == "b'x'\nthread\n27000000.0\n"


def test_memory_is_limited_beside_what_the_store_had():
    before = f"had = bytearray({sandbox.MAX_MEMORY})\n"
    assert run(f"bytearray({sandbox.MAX_MEMORY} - (64 << 20))", before=before).returncode == 0
    assert "MemoryError" in refused(f"bytearray({sandbox.MAX_MEMORY} + (64 << 20))", before=before)


def test_processor_time_is_limited():
    code = """
print(resource.getrlimit(resource.RLIMIT_CPU), flush=True)
resource.setrlimit(resource.RLIMIT_CPU, (1, 7))
while True: pass
"""
    done = run(code)
    assert done.stdout == "(6, 7)\n"  # the lower one says why it ends, the upper one makes sure
    assert done.returncode == -signal.SIGXCPU


def test_files_core_dumps_and_descriptors_are_limited():
    code = """
limited = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)
print([resource.getrlimit(number)[1] for number in limited])
"""
    assert run(code).stdout == f"[0, 0, {MAX_DESCRIPTORS + 64}]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_job_ends_with_its_store():
    code = """
number = ctypes.c_int()
syscalls.libc.prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
print(number.value)
"""
    assert run(code).stdout == f"{signal.SIGKILL.value}\n"


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="no such kernel")
def test_where_memory_is_used_up_the_kernel_ends_a_job_first():
    assert run("print(open('/proc/self/oom_score_adj').read())").stdout.strip() == "1000"


def run_without(call: str, code: str) -> subprocess.CompletedProcess:
    """Runs code where a container's filter forbids a system call, which is given by its number."""
    outside = f"""
from unittest.mock import patch
syscalls.libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
with patch.object(syscalls, "numbers_of_forbidden", lambda allowed: [{call}]):
    sandbox._enter_seccomp(())
"""
    command = [sys.executable, "-c", ENTER.replace("sandbox.enter(roots, 5.0)", outside) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_seccomp
def test_what_cannot_be_had_in_a_container_is_not_said_to_protect():
    prctl = "{'x86_64': 157, 'aarch64': 167}[os.uname().machine]"
    done = run_without(prctl, "print(sandbox.protection())")
    assert done.stdout == "['limits of time, memory and files']\n", done.stderr


@needs_seccomp
@needs_landlock
def test_a_job_that_cannot_be_confined_says_why_it_does_not_go_on():
    done = run_without("syscalls.LANDLOCK_RESTRICT_SELF", "sandbox.enter(roots, 5.0)")
    assert "does not apply it to a check: Operation not permitted" in done.stderr
