"""Building the C kernels: cached, and every failure says what to do."""

import pytest

from multilora_kernels import NativeUnavailableError
from multilora_kernels.native import compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_build_is_kept_and_used_again(cache):
    first = compiler._build()
    assert first.parent == cache
    made = first.stat().st_mtime_ns
    assert compiler._build() == first
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in cache.iterdir()] == [first.name]


def test_another_source_gets_another_build(cache, monkeypatch, tmp_path):
    first = compiler._build()
    changed = tmp_path / "changed.c"
    changed.write_text(compiler.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(compiler, "SOURCE", changed)
    assert compiler._build() != first


def test_without_a_compiler_the_error_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with pytest.raises(NativeUnavailableError, match=r"no C compiler found.*apt-get install gcc"):
        compiler._build()


def test_a_failed_compilation_shows_the_compilers_words(cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("int main(void) { return nonsense; }\n")
    monkeypatch.setattr(compiler, "SOURCE", broken)
    with pytest.raises(NativeUnavailableError, match=r"failed with exit status 1:[\s\S]*nonsense"):
        compiler._build()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_setting(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(blocked))
    with pytest.raises(NativeUnavailableError, match="set MULTILORA_CACHE_DIR"):
        compiler._build()
