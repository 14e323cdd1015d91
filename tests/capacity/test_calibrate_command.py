"""`vllm-multilora calibrate` against a server that answers as vLLM's HTTP routes do, at once."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_multilora import __version__
from vllm_multilora.cli import main
from vllm_multilora.toolbox.capacity.calibration import read_calibration
from vllm_multilora.toolbox.clients.completions import Ask, Completions

pytestmark = pytest.mark.slow

SIZES = {"acme": 1_000_000, "globex": 4_000_000, "legal": 2_000_000, "sales": 3_000_000}
STEP_S, LATE_S = 0.005, 0.02
METRICS = 'vllm:other 1\nvllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        known = {name for name, at in server.asked.items() if time.monotonic() - at >= server.lag_s}
        rows = [
            {
                "id": name,
                "path": f"/adapters/{name}",
                "state": "slot" if name in known else "absent",
                "bytes": size if name in known else 0,
                "kind": server.kinds.get(name, "lora") if name in known else None,
            }
            for name, size in server.sizes.items()
        ]
        body = {
            "/v1/models": {
                "data": [
                    {"id": "base", "root": "/models/tiny", "parent": None, "max_model_len": 128},
                    {"id": "acme", "root": "/adapters/acme", "parent": "base"},
                ]
            },
            "/v1/lora_adapters": {
                "data": rows,
                "slots": {"total": 4, "free": 0},
                "cpu": {"adapters": 0, "bytes": 0, "bytes_limit": 10**9, "adapters_limit": 8},
            },
            "/version": {"version": "0.32.0"},
            "/metrics": METRICS,
        }[self.path]
        if self.path == "/v1/lora_adapters":
            for part in (body, *rows):
                for key in server.hidden & part.keys():
                    del part[key]
        self.answer(200, body if isinstance(body, str) else json.dumps(body))

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuses:
            self.answer(404, "no such adapter")
            return
        self.server.asked.setdefault(asked["model"], time.monotonic())
        if asked["model"] in self.server.kinds:
            self.answer(400, "activated by tokens that the prompt does not contain")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(self.server.slow.pop(asked["model"], 0.0))
        if asked["max_tokens"] == 1:
            time.sleep(LATE_S)  # not before those have begun beside which it is asked for
        try:
            for n in range(1, asked["max_tokens"] + 1):
                event = {"choices": [{}], "usage": {"completion_tokens": n}}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                if asked["max_tokens"] > 1:
                    time.sleep(STEP_S)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # whoever asked has seen enough
        self.close_connection = True


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.refuses, server.hidden, server.kinds = {}, False, set(), {}
    server.sizes, server.lag_s, server.slow = SIZES, 0.0, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def calibrate(server, output, *flags):
    words = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--output", str(output)]
    return main(["calibrate", "--url", f"http://127.0.0.1:{server.server_port}", *words, *flags])


def test_a_server_is_measured_into_a_file_that_serves_a_plan(server, tmp_path, capsys):
    file, trace = tmp_path / "calibration.json", tmp_path / "trace.csv"
    assert calibrate(server, file) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {file}: ")
    assert "a load from page cache takes " in out
    assert "measuring loads of adapters from page cache" in err
    found = read_calibration(file)
    assert found.model == ["base", "/models/tiny"]
    assert found.versions == {"vllm": "0.32.0", "vllm-multilora": __version__}
    assert found.machine.cores > 0
    settings = found.settings
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (4, 64)
    assert (settings.max_model_len, settings.max_loras, settings.kv_tokens) == (128, 4, 1600)
    assert (settings.max_cpu_loras, settings.cpu_cache_bytes) == (8, 10**9)
    assert found.adapters == SIZES
    assert sum(found.step_s.values()) > 0
    assert (found.ranges.rows, found.ranges.prompt_tokens) == (4, 64)
    assert found.ranges.load_bytes == max(SIZES.values())
    trace.write_text("time,adapter,prompt_tokens,generation_tokens\n0,acme,20,4\n0,base,20,4\n")
    assert main(["plan", "--traffic", str(trace), "--calibration", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "2 requests in " in out
    assert "error" not in err


def test_one_cold_adapter_is_enough_for_a_plan(server, tmp_path, capsys):
    """The server says its size a second after it was read, as vLLM's may."""
    server.sizes, server.lag_s = {"acme": SIZES["acme"]}, 1.0
    file, trace = tmp_path / "calibration.json", tmp_path / "trace.csv"
    assert calibrate(server, file) == 0
    assert read_calibration(file).adapters == server.sizes
    trace.write_text("time,adapter,prompt_tokens,generation_tokens\n0,acme,20,4\n")
    assert main(["plan", "--traffic", str(trace), "--calibration", str(file)]) == 0


def test_loads_that_do_not_fit_together_are_doubted_by_the_plan_too(server, tmp_path, capsys):
    server.sizes = {f"a{number}": 1_000_000 * (number + 1) for number in range(6)}
    server.slow = {"a0": 1.0, "a1": 1.0}  # the smallest ones
    file, trace = tmp_path / "calibration.json", tmp_path / "trace.csv"
    assert calibrate(server, file) == 0
    assert re.search(r"times of \d+ loads are doubtful: .* restart the server", captured(capsys))
    trace.write_text("time,adapter,prompt_tokens,generation_tokens\n0,a0,20,4\n")
    assert main(["plan", "--traffic", str(trace), "--calibration", str(file)]) == 0
    assert "its times of loads are doubtful: " in captured(capsys)


def captured(capsys):
    return "".join(capsys.readouterr())


def test_a_server_without_cold_adapters_is_refused_at_once(server, tmp_path, capsys):
    server.asked = dict.fromkeys(SIZES, 0.0)
    assert calibrate(server, tmp_path / "calibration.json") == 2
    err = capsys.readouterr().err
    assert "has 4 adapters, and all have been requested, so no load can be timed" in err
    assert "measuring" not in err


def test_the_last_prompt_is_timed_as_the_others_are(server):
    """Its token and those of the requests beside it come from one step, in any order."""
    client = Completions(f"http://127.0.0.1:{server.server_port}")
    streams, ((late,),) = client.beside([Ask("base", 16, 500)], [[Ask("base", 32, 1)]])
    assert streams[0].tokens_s[-1] >= late.tokens_s[-1]
    assert len(streams[0].tokens_s) < 500


def test_a_server_that_refuses_is_named(server, tmp_path, capsys):
    server.refuses = True
    assert calibrate(server, tmp_path / "calibration.json") == 2
    err = capsys.readouterr().err
    assert "calibrate: error: a request for base failed: 404 no such adapter" in err
    assert not (tmp_path / "calibration.json").exists()


@pytest.mark.parametrize("name", ["acme", "legal"], ids=["alone", "beside others"])
def test_an_adapter_that_answers_no_prompt_is_left_out(server, tmp_path, capsys, name):
    server.kinds[name] = "alora"
    file = tmp_path / "calibration.json"
    assert calibrate(server, file) == 0
    assert f"measuring no load of {name}: a request for {name} failed: 400 activated" in (
        capsys.readouterr().err
    )
    assert read_calibration(file).adapters.keys() == SIZES.keys() - {name}


def test_a_file_that_cannot_be_written_is_named(server, tmp_path, capsys):
    assert calibrate(server, tmp_path / "none" / "calibration.json") == 2
    err = capsys.readouterr().err
    assert "calibration.json: cannot be written: No such file" in err
    assert "measuring" not in err


def test_files_that_are_elsewhere_cannot_be_read_from_disk(server, tmp_path, capsys):
    assert calibrate(server, tmp_path / "calibration.json", "--from-disk") == 2
    assert "--from-disk: /adapters/acme: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hidden", "flags", "message"),
    [
        ({"slots", "cpu", "bytes", "path"}, [], "a tenant's key cannot calibrate"),
        ({"path"}, ["--from-disk"], "give an admin key with --api-key"),
    ],
    ids=["tenant", "folders"],
)
def test_a_key_that_shows_too_little_is_named(server, tmp_path, capsys, hidden, flags, message):
    server.hidden = hidden
    assert calibrate(server, tmp_path / "calibration.json", *flags) == 2
    assert message in capsys.readouterr().err
