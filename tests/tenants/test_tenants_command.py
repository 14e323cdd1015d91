"""`vllm-multilora tenants` makes what a tenants file takes, and says what it does not take."""

import io

import pytest

from vllm_multilora.cli import main
from vllm_multilora.tenants.tenants_file import parse_tenants


def test_a_new_key_is_printed_with_its_hash(capsys, monkeypatch):
    assert main(["tenants", "new"]) == 0
    key, hashed = capsys.readouterr().out.split()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{key}\n"))
    assert main(["tenants", "hash"]) == 0
    assert capsys.readouterr().out.split() == [hashed]
    assert parse_tenants("t.yaml", f'tenants: {{acme: {{keys: ["{hashed}"]}}}}').keys


@pytest.mark.parametrize("key", [None, "", "\n", "clé", "a\tb", "k" * 513])
def test_what_no_client_can_send_is_no_key(key, capsys, monkeypatch):
    # Python has no standard input where whoever starts it has closed that.
    monkeypatch.setattr("sys.stdin", None if key is None else io.StringIO(key))
    assert main(["tenants", "hash"]) == 1
    assert "printable ASCII" in capsys.readouterr().err


def test_a_file_is_checked(tmp_path, capsys):
    assert main(["tenants", "new"]) == 0
    hashed = capsys.readouterr().out.split()[1]
    path = tmp_path / "tenants.yaml"
    path.write_text(f'tenants: {{acme: {{keys: ["{hashed}"], adapters: [acme-*]}}}}')
    assert main(["tenants", "check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  acme: acme-*"
    path.write_text("tenants: {acme: {}}")
    assert main(["tenants", "check", str(path)]) == 1
    assert "tenants.acme.keys" in capsys.readouterr().err
    path.unlink()
    assert main(["tenants", "check", str(path)]) == 2
    assert "cannot read the tenants: No such file" in capsys.readouterr().err


def test_a_file_is_asked_for_where_it_is_needed(capsys):
    assert main(["tenants", "check"]) == 2
    assert main(["tenants", "new", "file"]) == 2
    assert "check takes a file" in capsys.readouterr().err
