"""Building the C code: cached where nobody else can write, and every failure says what to do.

What a wheel brings is loaded instead, where there are no sources.
"""

import ctypes
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multilora_kernels import NativeUnavailableError, resolve_backend
from multilora_kernels.native import builds, compiler, processor, segment_gemm, trust
from multilora_kernels.native.builds import PACKING, Library
from multilora_kernels.native.compiler import built
from multilora_kernels.packs import packing, scatter


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path) -> Library:
    """A library that compiles in a moment."""
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    return Library("small", (source,), (), openmp=False)


@pytest.fixture(autouse=True)
def _fresh_features():
    yield
    processor._features.cache_clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, with nothing that says where else to keep anything."""
    monkeypatch.delenv("MULTILORA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def path_of(library: Library) -> Path:
    with built(library) as path:
        return path


def answer(library: Library) -> int:
    return compiler._load(library).answer()


def test_a_build_is_kept_and_used_again(cache, small):
    first = path_of(small)
    assert first.parent == cache
    made = first.stat().st_mtime_ns
    assert path_of(small) == first
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in cache.iterdir()] == [first.name]
    assert answer(small) == 42


def test_what_is_built_is_nobody_elses(cache, small):
    before = os.umask(0)
    try:
        path = path_of(small)
    finally:
        os.umask(before)
    assert trust.distrust(path) == trust.distrust(cache) == ""


def test_whatever_differs_gets_another_build(cache, small, tmp_path, monkeypatch):
    first = path_of(small)
    assert first.name.startswith("small-")
    assert path_of(replace(small, name="other")).name.startswith("other-")
    header = tmp_path / "small.h"
    header.write_text("/* new */\n")
    second = path_of(replace(small, headers=(header,)))
    small.sources[0].write_text("int answer(void) { return 43; }\n")
    assert len({first, second, path_of(small)}) == 3
    assert answer(small) == 43
    monkeypatch.setenv("MULTILORA_INSTRUCTIONS", "baseline")
    assert path_of(small).name.startswith("small-baseline-")


def test_the_packing_library_needs_no_openmp(cache):
    with built(PACKING) as path:
        shown = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True)
    assert "multilora_pack" in shown.stdout
    assert "GOMP" not in shown.stdout


def test_without_a_compiler_the_error_says_what_to_install(cache, monkeypatch, small):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(builds.shutil, "which", lambda name: None)
    with pytest.raises(NativeUnavailableError, match=r"no C compiler found.*apt-get install gcc"):
        path_of(small)


@pytest.mark.parametrize("names", [("gcc", "clang", "cc"), ("clang", "cc"), ("cc",)], ids=str)
def test_the_compiler_is_one_that_is_there(monkeypatch, names):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(builds.shutil, "which", lambda name: f"/bin/{name}" * (name in names))
    assert builds.compiler() == [f"/bin/{names[0]}"]
    monkeypatch.setenv("CC", "ccache gcc")
    assert builds.compiler() == ["ccache", "gcc"]


@pytest.mark.parametrize("wrong", ["compiler", "instructions"])
def test_kernels_that_cannot_be_had_are_tried_once_and_the_log_says_why(
    cache, tmp_path, monkeypatch, caplog, wrong
):
    calls = tmp_path / "calls"
    failing = tmp_path / "failing-cc"
    failing.write_text(f"#!/bin/sh\necho $* >> {calls}\necho no such option >&2\nexit 1\n")
    failing.chmod(0o700)
    if wrong == "compiler":
        monkeypatch.setenv("CC", str(failing))
    else:
        monkeypatch.setenv("MULTILORA_INSTRUCTIONS", "AVX-7")
    compiler.load_library.cache_clear()
    compiler.is_available.cache_clear()
    try:
        assert [resolve_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    finally:
        compiler.is_available.cache_clear()
    [record] = caplog.records
    reason = "no such option" if wrong == "compiler" else "MULTILORA_INSTRUCTIONS=AVX-7"
    assert reason in record.message
    if wrong == "compiler":
        assert len(calls.read_text().splitlines()) == 1


def test_a_failed_compilation_shows_the_compilers_words(cache, small):
    small.sources[0].write_text("int main(void) { return nonsense; }\n")
    with pytest.raises(NativeUnavailableError, match=r"failed with exit status 1:[\s\S]*nonsense"):
        path_of(small)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_setting(monkeypatch, tmp_path, small):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(blocked))
    with pytest.raises(NativeUnavailableError, match="set MULTILORA_CACHE_DIR"):
        path_of(small)


@pytest.mark.parametrize("what", ["folder", "library"])
def test_a_configured_cache_that_others_can_write_to_is_refused(cache, small, what):
    path = path_of(small)
    spoilt = cache if what == "folder" else path
    spoilt.chmod(0o777)
    with pytest.raises(NativeUnavailableError, match=r"writable for others \(mode 777\).*go-w"):
        answer(small)


def test_a_library_of_another_user_is_not_loaded(home, small, monkeypatch, caplog):
    """As in a folder that several users share, under a name that anybody can work out."""
    path = path_of(small)
    path.write_bytes(b"not even a library")
    real = Path.stat

    def stat(self, **options):
        status = real(self, **options)
        if self != path:
            return status
        fields = list(status)
        fields[4] = os.geteuid() + 1  # st_uid
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat)
    assert answer(small) == 42
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"{path} belongs to user {os.geteuid() + 1}" in record.message


def test_a_link_that_leads_elsewhere_once_it_was_looked_at_is_not_followed(
    cache, small, tmp_path, monkeypatch
):
    """In `/tmp`, the link to the cache may be another user's."""
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "theirs").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "own")
    name = path_of(small).name
    source = tmp_path / "theirs.c"
    source.write_text("int answer(void) { return 666; }\n")
    instructions = processor.chosen_set()
    builds.compile_library(
        replace(small, sources=(source,)),
        instructions,
        builds.compiler(),
        tmp_path / "theirs" / name,
    )

    def looked_at(path: Path) -> str:
        reason = trust.distrust(path)
        cache.unlink(missing_ok=True)
        cache.symlink_to(tmp_path / "theirs")
        return reason

    monkeypatch.setattr(compiler, "distrust", looked_at)
    assert answer(small) == 42


def test_a_folder_below_one_that_everybody_may_write_to_is_not_trusted(tmp_path):
    folder = tmp_path / "open" / "mine"
    folder.mkdir(parents=True)
    assert trust.distrust(folder) == ""
    folder.parent.chmod(0o777)
    assert "writable for everybody" in trust.distrust(folder)
    folder.parent.chmod(0o1777)  # as /tmp: nobody renames what is another's
    assert trust.distrust(folder) == ""


@pytest.mark.parametrize("why", ["no-home", "home-is-a-file", "others-may-write"])
def test_without_a_place_to_keep_it_code_is_built_for_the_process(
    home, small, monkeypatch, caplog, why
):
    words = "set MULTILORA_CACHE_DIR"
    if why == "no-home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        words = f"user {os.geteuid()} has no home folder"
    elif why == "home-is-a-file":
        home.rmdir()
        home.write_text("")
    else:
        (home / ".cache" / "vllm-multilora").mkdir(parents=True, mode=0o777)
        (home / ".cache" / "vllm-multilora").chmod(0o777)
        words = "writable for others"
    with built(small) as path:
        folder = path.parent
        assert folder.stat().st_mode & 0o77 == 0
        assert ctypes.CDLL(str(path)).answer() == 42
    assert not folder.exists()
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "compiled for this process alone" in record.message
    assert words in record.message


@pytest.fixture
def installed(small, tmp_path, monkeypatch) -> Library:
    """The small library as a wheel has it: a build for one instruction set, and no sources."""
    monkeypatch.setattr(compiler, "BUILT_FOLDER", tmp_path)
    path = tmp_path / small.file_name(processor.chosen_set())
    builds.compile_library(small, processor.chosen_set(), builds.compiler(), path)
    small.sources[0].unlink()
    return small


def test_without_sources_the_build_of_the_wheel_is_loaded(cache, installed, monkeypatch):
    monkeypatch.setattr(builds.shutil, "which", lambda name: None)
    assert answer(installed) == 42
    assert not cache.exists()


def test_an_installation_without_its_builds_says_so(cache, installed, tmp_path):
    (tmp_path / installed.file_name(processor.chosen_set())).unlink()
    with pytest.raises(NativeUnavailableError, match=r"small-.*\.so is missing.*reinstall"):
        answer(installed)


@pytest.mark.parametrize(
    ("lacking", "best"),
    [
        (set(), "avx512bf16"),
        ({"avx512_bf16"}, "avx512"),
        ({"avx512vl"}, "avx2"),
        ({"f16c"}, "baseline"),
    ],
)
def test_the_processor_says_which_instructions_are_used(monkeypatch, tmp_path, lacking, best):
    [most, *_] = builds.instruction_sets("x86_64")
    text = (
        f"processor\t: 0\nflags\t\t: fpu {' '.join(most.needs - lacking)} sse2\n\nprocessor\t: 1\n"
    )
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("MULTILORA_INSTRUCTIONS", raising=False)
    processor._features.cache_clear()
    assert processor.chosen_set().name == best
    monkeypatch.setenv("MULTILORA_INSTRUCTIONS", "baseline")
    assert processor.chosen_set().name == "baseline"
    monkeypatch.setenv("MULTILORA_INSTRUCTIONS", "avx2")
    if best == "baseline":
        with pytest.raises(NativeUnavailableError, match="it needs f16c, which it lacks"):
            processor.chosen_set()
    else:
        assert processor.chosen_set().name == "avx2"
    monkeypatch.setenv("MULTILORA_INSTRUCTIONS", "sse9")
    with pytest.raises(NativeUnavailableError, match=r"does not exist; one of .*baseline runs"):
        processor.chosen_set()


@pytest.mark.parametrize(
    ("module", "constant", "other", "load"),
    [
        (packing, "PIECE", np.dtype("V72"), packing._native),
        (scatter, "PIECE", np.dtype("V72"), scatter._library.__wrapped__),
        (segment_gemm, "MAX_SLICES", 17, segment_gemm._library.__wrapped__),
    ],
    ids=["packing", "scatter", "products"],
)
def test_a_library_with_structs_of_another_size_is_not_used(
    monkeypatch, module, constant, other, load
):
    load()
    monkeypatch.setattr(module, constant, other)
    with pytest.raises(NativeUnavailableError, match=r"is \d+ there and \d+ here; reinstall"):
        load()


def test_the_compiler_module_imports_no_torch():
    code = "import sys, multilora_kernels.native.compiler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
