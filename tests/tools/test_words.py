"""Docstrings stand by themselves, sentences are short, and names use the field's words."""

import pytest

from tools import words


def test_every_docstring_stands_by_itself():
    assert [*words.leaning_docstrings()] == []


def test_no_sentence_of_a_page_is_too_long():
    assert [*words.long_sentences()] == []


def test_names_with_words_of_our_own_only_get_fewer():
    names = words.own_names()
    assert [name for name in names if name not in words.kept()] == []
    gone = [name for name in words.kept() if name not in names]
    assert gone == [], "run python -m tools.words --lower"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with nothing in it, in place of this one."""
    monkeypatch.setattr(words, "tracked_files", lambda *suffixes: sorted(tree_files(*suffixes)))
    monkeypatch.setattr(words, "ROOT", tmp_path)

    def tree_files(*suffixes):
        found = (path for path in tmp_path.rglob("*") if path.suffix in suffixes)
        return [str(path.relative_to(tmp_path)) for path in found]

    return tmp_path


@pytest.mark.parametrize("begin", ["Of a file.", "That of a file.", "Those of it.", "Whose it is."])
def test_a_docstring_that_leans_on_the_name_above_it_is_found(tree, begin):
    (tree / "leaning.py").write_text(f'LIMIT = 1\n"""{begin}"""\n')
    assert [*words.leaning_docstrings()] == [("leaning.py", 2, begin)]


def test_cells_items_and_clauses_are_sentences_and_code_is_none(tree):
    half = " ".join(["word"] * 30)
    page = f"{half}: {half}; {half}.\n\n| {half} | {half} |\n\n* {half}\n* {half}\n"
    page += f"\n```\n{half} {half}\n```\n<!-- figures: some -->\n{half} {half}\n<!-- end -->\n"
    (tree / "page.md").write_text(page)
    assert [*words.long_sentences()] == []
    (tree / "page.md").write_text(f"{half}\n[{half}](page.md).\n")
    assert [(name, count) for name, count, _ in words.long_sentences()] == [("page.md", 60)]


def test_definitions_with_words_of_our_own_are_found(tree):
    (tree / "desk.py").write_text(
        "_MOST_BYTES = 1\n"
        "class Taken: ...\n"
        "def told(aside, *, at_least, taken): wants = most = 1\n"
        "told.party = told\n"
        "from x import y as Desk\n"
    )
    (tree / "rows.c").write_text("/* MOST_TOLD */\n#define MOST_ROWS 64\n")
    expected = {"_MOST_BYTES", "Taken", "told", "aside", "wants", "party", "Desk", "desk"}
    assert set(words.own_names()) == {*expected, "MOST_ROWS"}


def test_lanes_are_the_word_for_kernels_alone(tree):
    (tree / "kernels/packs").mkdir(parents=True)
    for file in (tree / "kernels/packs/scatter.py", tree / "queue.py"):
        file.write_text("lanes = 4\n")
    assert words.own_names() == {"lanes": 1}


def test_the_command_names_what_must_be_rewritten(tree, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["words"])
    monkeypatch.setattr(words, "FILE", tree / "words.json")
    (tree / "words.json").write_text('["told", "gone"]')
    (tree / "good.py").write_text("told = 1\n")
    assert words.main() == 0
    (tree / "bad.py").write_text("told = desk = 1\n")
    assert words.main() == 1
    assert "desk: use the field's word" in capsys.readouterr().out
    (tree / "bad.py").unlink()
    monkeypatch.setattr("sys.argv", ["words", "--lower"])
    assert words.main() == 0
    assert words.kept() == ["told"]
