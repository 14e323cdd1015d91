"""The numbers of seams only fall, and no room grows beyond its lines."""

from tools import seams


def test_numbers_of_seams_are_those_that_are_kept():
    kept = seams.kept()
    for name, count in seams.seams().items():
        assert count <= kept[name], f"{name}: use a setting or a class of vLLM's, not a new seam"
        assert count == kept[name], f"{name} has fallen: run python -m tools.seams --lower"


def test_rooms_have_no_more_lines_than_are_kept():
    kept = seams.kept()
    assert {n: c for n, c in seams.lines().items() if c > kept[n]} == {}


def test_numbers_that_are_written_never_rise():
    now = {**seams.seams(), **seams.lines()}
    higher = seams.lowered({name: count + 1000 for name, count in now.items()})
    assert all(now[name] <= count < now[name] + 1000 for name, count in higher.items())
    lower = {name: count - 1 for name, count in now.items()}
    assert seams.lowered(lower) == lower


def test_the_command_prints_every_number(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["seams"])
    assert seams.main() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in seams.kept())
