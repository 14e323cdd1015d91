"""Digests that adapters must have, and the command that prints them."""

import json
from pathlib import Path

import pytest

from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.cli import main
from vllm_multilora.errors import ConfigError

from ..checkpoints import layout, weights, write
from ..corpus.headers import join, split
from ..files.test_source import RANKS
from ..packs import take

ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "required.json"


def test_an_adapter_has_one_of_its_digests(file):
    file.write_text(json.dumps({"a": ONE, "b": [ONE, TWO]}))
    required = RequiredDigests(str(file))
    assert required.refuse("a", ONE) is None
    assert required.refuse("b", TWO) is None
    problem = required.refuse("a", TWO)
    assert (problem.code, problem.file, problem.where) == (Code.WRONG_DIGEST, "a", "digest")
    assert (problem.found, problem.expected) == (TWO, ONE)
    assert "--multilora-require-digest" in problem.hint
    assert required.refuse("b", THREE).expected == f"{ONE} or {TWO}"
    assert "none is listed for this name" in required.refuse("c", ONE).expected


def test_all_others_may_be_let_in(file):
    file.write_text(json.dumps({"a": ONE, "*": "any"}))
    required = RequiredDigests(str(file))
    assert required.refuse("c", THREE) is None
    assert required.refuse("a", THREE) is not None


def test_the_file_is_read_again_and_stays_in_force_where_it_is_broken(file, caplog):
    file.write_text(json.dumps({"a": ONE}))
    required = RequiredDigests(str(file))
    file.write_text(json.dumps({"a": [TWO, THREE]}))
    assert required.refuse("a", TWO) is None
    file.write_text("{")
    assert required.refuse("a", ONE) is not None
    assert "stay as they were" in caplog.text
    file.unlink()
    assert required.refuse("a", TWO) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: found invalid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"a": "{ONE}", "a": "{TWO}"}}', "found the key 'a' twice"),
        ("[]", "expected an object"),
        ('{"a": "12ab"}', "expected a digest of 64"),
        ('{"a": "any"}', "expected a digest of 64"),
        (json.dumps({"a": [ONE, 1]}), "expected a digest of 64"),
        (None, "No such file"),
    ],
)
def test_a_mistake_is_said_at_once(file, text, message):
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RequiredDigests(str(file))


def test_the_command_prints_what_a_store_computes(tmp_path, capsys):
    folder = write(tmp_path / "adapter", weights(RANKS), rank=4, alpha=8)
    expected = take(folder, layout()).taken.digest
    assert main(["digest", str(folder)]) == 0
    assert capsys.readouterr().out == f"{expected}  {folder}\n"
    assert main(["digest", "--json", str(folder), str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"adapter": expected}
    assert "nowhere" in captured.err


def test_a_linked_folder_has_the_name_of_the_link(tmp_path, monkeypatch, capsys):
    """As a directory of adapters names it: so versions are switched."""
    folder = write(tmp_path / "acme-v2", weights(RANKS), rank=4, alpha=8)
    (tmp_path / "acme").symlink_to(folder)
    assert main(["digest", "--json", str(tmp_path / "acme") + "/"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["acme"]
    monkeypatch.chdir(folder)
    assert main(["digest", "--json", "."]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["acme-v2"]


def test_two_folders_of_one_name_are_no_json_object(tmp_path, capsys):
    folders = [
        str(write(tmp_path / version / "acme", weights(RANKS), rank=4, alpha=8))
        for version in ("old", "new")
    ]
    assert main(["digest", "--json", *folders]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "found several folders named acme" in captured.err
    assert main(["digest", *folders]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == folders


def test_the_order_of_tensors_in_the_file_is_in_no_digest(tmp_path, capsys):
    folder = write(tmp_path / "adapter", weights(RANKS), rank=4, alpha=8)
    other = write(tmp_path / "other", weights(RANKS), rank=4, alpha=8)
    path = other / "adapter_model.safetensors"
    header, data = split(path.read_bytes())
    turned, tensors = b"", {}
    for name in reversed([key for key in header if key != "__metadata__"]):
        begin, end = header[name]["data_offsets"]
        tensors[name] = header[name] | {"data_offsets": [len(turned), len(turned) + end - begin]}
        turned += data[begin:end]
    path.write_bytes(join(json.dumps(tensors).encode(), turned))
    assert main(["digest", str(folder), str(other)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == second.split()[0]
    assert first.split()[0] == take(other, layout()).taken.digest
