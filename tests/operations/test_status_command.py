"""`vllm-multilora status`: what a server says of its adapters, as a table and as JSON."""

import json
import re
import socket
import ssl
import subprocess
import threading

import pytest

from vllm_multilora.cli import main
from vllm_multilora.toolbox.clients.http_client import base_url
from vllm_multilora.toolbox.commands.output.status_table import screen, table

NOW = 1_800_000_000.0


def adapter(name: str, **fields: object) -> dict[str, object]:
    return {
        "id": name,
        "object": "lora_adapter",
        "int_id": 1,
        "path": f"/adapters/{name}",
        "state": "absent",
        "tier": "disk",
        "slot": None,
        "kind": None,
        "rank": None,
        "bytes": 0,
        "pinned": False,
        "requests": 0,
        "hits": 0,
        "loads": 0,
        "last_used": None,
        "last_error": None,
        **fields,
    }


LISTING = {
    "object": "list",
    "data": [
        adapter("cold"),
        adapter("broken", state="failed", last_error="adapter_config.json is missing"),
        adapter(
            "hot",
            state="slot",
            tier="gpu",
            slot=3,
            rank=16,
            bytes=84_000_000,
            pinned=True,
            requests=1200,
            hits=40,
            last_used=NOW - 125,
        ),
    ],
    "slots": {"total": 8, "free": 7},
    "cpu": {"adapters": 1, "bytes": 84_000_000, "bytes_limit": 2e9, "adapters_limit": None},
}


def test_kernels_that_a_start_has_chosen_have_a_table_of_their_own():
    row = {"kind": "linear 208 -> 128", "layers": "down_proj", "rows": "all", "kernels": "vllm"}
    row |= {"reason": "wrong", "problem": "row 3 of 8 is off"}
    lines = table({**LISTING, "kernels": [row]}, now=NOW)
    place = next(i for i, line in enumerate(lines) if line.startswith("LAYERS"))
    assert re.split(r"  +", lines[place + 1]) == [
        *("down_proj", "linear 208 -> 128", "all", "vllm", "wrong", "row 3 of 8 is off")
    ]
    assert not any(line.startswith("LAYERS") for line in table(LISTING, now=NOW))


def test_a_proxy_is_not_asked_for_this_machine_and_gets_no_key(site, monkeypatch, capsys):
    keys = []

    def proxied(_, headers):
        keys.append(headers.get("Authorization"))
        return 200, json.dumps(LISTING)

    site.answers["/v1/lora_adapters"] = proxied
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    assert main(["status", "--url", site.url, "--api-key", "sk-admin"]) == 0
    assert keys == ["Bearer sk-admin"]
    monkeypatch.setenv("http_proxy", site.url)
    for own in ("http://localhost:1", "http://[::1]:1", "http://127.9.9.9:1"):
        assert main(["status", "--url", own, "--api-key", "sk-admin"]) == 2
    assert len(keys) == 1
    capsys.readouterr()
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    assert main(["status", "--url", "http://gpu.example.com:8000"]) == 2
    error = capsys.readouterr().err
    assert "cannot be reached through the proxy 127.0.0.1:1: Connection refused" in error


def test_the_table_has_the_nearest_adapters_first_and_errors_below():
    lines = table(LISTING, now=NOW)
    assert lines[:3] == [
        "slots        1 of 8",
        "host memory  1 adapter, 80.1 MiB of 1.86 GiB",
        "registered   3",
    ]
    header, hot, broken, cold = (line.split() for line in lines[4:8])
    assert header[:3] == ["ADAPTER", "STATE", "SLOT"]
    assert " ".join(hot) == "hot slot 3 16 80 yes 1200 40 2 min ago /adapters/hot"
    assert broken[:2] == ["broken", "failed"]
    assert " ".join(cold) == "cold absent 0 0 /adapters/cold"
    assert lines[8:] == ["", "broken: adapter_config.json is missing"]


def test_a_client_without_the_admin_key_sees_no_folders():
    shown = [{key: value for key, value in row.items() if key != "path"} for row in LISTING["data"]]
    lines = table({**LISTING, "data": shown}, now=NOW)
    assert lines[0] == "slots        1 of 8"
    assert lines[4].split()[-2:] == ["LAST", "USED"]
    assert lines[5].endswith("2 min ago")


def test_a_tenant_sees_the_state_of_its_own_adapters(site, capsys):
    keys = ("id", "object", "state", "kind", "rank", "last_error")
    rows = [
        {key: row[key] for key in keys}
        for row in (
            adapter("acme-a", state="slot", kind="lora", rank=16),
            adapter("acme-b", state="failed", kind=None, last_error="no rank"),
        )
    ]
    listing = {"object": "list", "data": rows}
    site.answers["/v1/lora_adapters"] = lambda *_: (200, json.dumps(listing))
    assert main(["status", "--url", site.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "registered   2",
        "",
        "ADAPTER  STATE   KIND  RANK",
        "acme-a   slot    lora    16",
        "acme-b   failed",
        "",
        "acme-b: no rank",
    ]


def test_a_reason_of_several_lines_fills_the_screen_no_further_than_it_goes():
    problems = "\n".join(f"tensor {number} is missing" for number in range(9))
    failed = [adapter(f"a{i}", state="failed", last_error=problems) for i in range(3)]
    lines = table({**LISTING, "data": failed}, now=NOW)
    assert lines[-1] == "tensor 8 is missing"
    assert not any("\n" in line for line in lines)
    assert len(screen(lines, width=80, height=24).splitlines()) == 23


def test_a_terminal_obeys_no_text_of_a_server():
    evil = "\x1b[2J\x9b\u202eé"
    lines = table({**LISTING, "data": [adapter(evil, path=evil, last_error=evil)]}, now=NOW)
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == r"\x1b[2J\x9b\u202eé: \x1b[2J\x9b\u202eé"


def test_the_screen_is_cleared_and_filled_no_further_than_it_goes():
    text = screen([f"line {i} {'x' * 50}" for i in range(10)], width=10, height=5)
    assert text.startswith("\x1b[H\x1b[2J")
    assert text.splitlines()[-1] == "... 7 more"[:10]
    assert len(text.splitlines()) == 4
    assert all(len(line) <= 10 for line in text.removeprefix("\x1b[H\x1b[2J").splitlines())


def test_names_in_wide_letters_are_aligned_and_cut_as_a_terminal_shows_them():
    names = ("日本", "cafe\u0301", "😀", "hot")
    lines = table({**LISTING, "data": [adapter(name) for name in names]}, now=NOW)[5:]
    shown = {line.split()[0]: line.partition("absent")[0] for line in lines}
    assert shown == {
        "日本": "日本     ",
        "cafe\u0301": "cafe\u0301     ",
        "😀": "😀       ",
        "hot": "hot      ",
    }
    text = screen(["日本語"], width=5, height=5)
    assert text.removeprefix("\x1b[H\x1b[2J") == "日本\n"


def test_once(site, capsys):
    site.answers["/v1/lora_adapters"] = lambda *_: (200, json.dumps(LISTING))
    assert main(["status", "--url", site.url]) == 0
    assert capsys.readouterr().out.startswith("slots        1 of 8\n")
    assert main(["status", "--url", site.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == LISTING


def test_watching_goes_on_until_the_server_is_gone(site, capsys):
    answers = [(200, json.dumps(LISTING))] * 3 + [(503, "shutting down")]
    site.answers["/v1/lora_adapters"] = lambda *_: answers.pop(0)
    assert main(["status", "--url", site.url, "--watch", "0.01", "--json"]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == [LISTING] * 3
    assert "answers 503: shutting down" in captured.err


def test_a_watch_tells_rates_from_its_second_refresh_on_over_a_restart_too(
    site, capsys, monkeypatch
):
    def metrics(tokens, requests, loads, refused):
        return "\n".join(
            (
                f'vllm:generation_tokens_total{{model_name="base"}} {tokens}',
                f'vllm:request_success_total{{finished_reason="stop"}} {requests}',
                f'vllm:lora_adapter_load_total{{source="disk",lora_name="a"}} {loads}',
                f'vllm:lora_adapter_load_total{{source="cpu",lora_name="a"}} {7 * loads}',
                f'vllm:lora_refused_requests_total{{status="429"}} {refused}\n',
            )
        )

    scrapes = [(900, 90, 9, 9), (1900, 100, 11, 9), (30, 3, 1, 2)]  # the last after a restart
    answers = [*(200,) * len(scrapes), 503]
    site.answers["/v1/lora_adapters"] = lambda *_: (answers.pop(0), json.dumps(LISTING))
    site.answers["/metrics"] = lambda *_: (200, metrics(*scrapes.pop(0)))
    moments = iter((100.0, 110.0, 120.0))
    snapshots = "vllm_multilora.toolbox.advice.snapshots"
    monkeypatch.setattr(f"{snapshots}.time.monotonic", lambda: next(moments, 200.0))
    assert main(["status", "--url", site.url, "--watch", "0.01", "--json"]) == 2
    seen = [json.loads(line).get("rates") for line in capsys.readouterr().out.splitlines()]
    assert seen == [
        None,
        {"tokens": 100.0, "requests": 1.0, "loads": 0.2, "refusals": 0.0},
        {"tokens": 3.0, "requests": 0.3, "loads": 0.1, "refusals": 0.2},
    ]
    lines = table({**LISTING, "rates": seen[1]}, now=NOW)
    assert "per second   100.0 tokens, 1.0 requests, 0.2 loads, 0.0 refusals" in lines


def test_ctrl_c_ends_a_watch_and_all_is_well(site, capsys, monkeypatch):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    site.answers["/v1/lora_adapters"] = lambda *_: (200, json.dumps(LISTING))
    monkeypatch.setattr("time.sleep", interrupted)
    assert main(["status", "--url", site.url, "--watch"]) == 0


def test_the_key_of_a_guarded_server(site, capsys, monkeypatch):
    def guarded(_: object, headers: dict[str, str]) -> tuple[int, str]:
        known = headers.get("Authorization") == "Bearer secret"
        return (200, json.dumps(LISTING)) if known else (401, "No valid key.")

    site.answers["/v1/lora_adapters"] = guarded
    assert main(["status", "--url", site.url]) == 2
    hint = "401: No valid key; give a key in $VLLM_API_KEY or with --api-key\n"
    assert capsys.readouterr().err.endswith(hint)
    assert main(["status", "--url", site.url, "--api-key", "secret"]) == 0
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["status", "--url", site.url]) == 0


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://localhost", "http://", "http://localhost:80OO"),
        *("http://localhost:99999", "http://[::1", "http://a b/", "http://a/b c", "http://a..b"),
        *(f"http://{'a' * 300}", "http://user@localhost", "http://localhost/\u00e9", "http://a\n"),
    ],
)
def test_what_is_no_address_is_not_asked(url, capsys):
    assert main(["status", "--url", url]) == 2
    assert f"{url!r} is not a server address: expected http" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["", "/", "/v1/"], ids=["plain", "slash", "as-openais-clients"])
@pytest.mark.parametrize("url", ["http://[::1]:8000", "https://llm.example", "http://a:1/b/c"])
def test_an_address_may_have_a_path_and_be_of_any_kind(url, end):
    assert base_url(url + end) == url


@pytest.mark.parametrize("key", ["a\nb", "\u20ac"])
def test_a_key_that_http_cannot_carry_is_not_sent(site, key, capsys):
    assert main(["status", "--url", site.url, "--api-key", key]) == 2
    err = capsys.readouterr().err
    assert "HTTP cannot carry the API key" in err
    assert key not in err


def test_something_that_speaks_no_http(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        greeter = threading.Thread(target=greet, daemon=True)
        greeter.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert main(["status", "--url", url]) == 2
        greeter.join(timeout=30)
    assert "cannot be reached: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "Not Found"), "is it a vLLM server with vllm-multilora and --enable-lora?"),
        ((404, ""), " answers 404; is it a vLLM server"),
        ((403, '{"error": {"message": "No.", "code": 403}}'), " answers 403: No.\n"),
        ((403, '{"error": "No."}'), " answers 403: No.\n"),
        ((200, "hello"), "did not answer with JSON"),
        ((200, "{}"), "did not answer with a list of adapters"),
        ((200, '{"data": null}'), "did not answer with a list of adapters"),
        ((200, "[" * 100_000), "did not answer with JSON"),
    ],
)
def test_servers_that_do_not_say(site, answer, message, capsys, tmp_path):
    site.answers["/v1/lora_adapters"] = lambda *_: answer
    sizes = ["--max-num-seqs", "2", "--max-num-batched-tokens", "2"]
    calibrate = ["calibrate", *sizes, "--output", str(tmp_path / "calibration.json")]
    for command in (["status"], calibrate):
        assert main([*command, "--url", site.url]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def certificate(tmp_path):
    """A file with a certificate for this machine, which nobody has issued, and its key."""
    file = tmp_path / "server.pem"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    written = ["-nodes", "-keyout", str(file), "-out", str(tmp_path / "certificate.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *named, *written]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + (tmp_path / "certificate.pem").read_text())
    return file


def test_a_server_with_a_certificate_of_ones_own_is_asked_once_it_is_named(
    site, certificate, monkeypatch, capsys
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    site.answers["/v1/lora_adapters"] = lambda *_: (200, json.dumps(LISTING))
    address = site.url.rpartition(":")[2]
    assert main(["status", "--url", f"https://localhost:{address}"]) == 2
    assert "(does it speak http:// only?)" in capsys.readouterr().err
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    assert main(["status", "--url", f"http://localhost:{address}"]) == 2
    assert "(does it speak https:// only?)" in capsys.readouterr().err
    assert main(["status", "--url", f"https://localhost:{address}"]) == 2
    hint = "(name the certificate of an authority of your own in $SSL_CERT_FILE)"
    assert f"cannot be reached: self-signed certificate {hint}" in capsys.readouterr().err
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert main(["status", "--url", f"https://127.0.0.1:{address}"]) == 2
    assert "certificate is not valid for '127.0.0.1'.\n" in capsys.readouterr().err
    assert main(["status", "--url", f"https://localhost:{address}"]) == 0
    assert "hot" in capsys.readouterr().out
