"""llama.cpp's server: all adapters loaded at the start, each request names its own."""

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request


def ask(url, one, new_tokens, began, seconds):
    body = {
        "prompt": one["prompt"],
        "n_predict": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
        "stream": True,
        "lora": [{"id": one["adapter"], "scale": 1.0}],
    }
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data: "):
                seconds.append(time.perf_counter() - began)
                last = json.loads(line[6:])
    assert last["tokens_predicted"] == new_tokens, last


def main():
    job = json.load(sys.stdin)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = len(job["requests"])
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [
                *(job["program"], "--model", job["gguf"], "--host", "127.0.0.1"),
                *("--port", str(port), "--threads", "2", "--parallel", str(slots)),
                *("--ctx-size", str(256 * slots), "--no-webui", "--lora-init-without-apply"),
                *(word for path in job["adapters"] for word in ("--lora", path)),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1).close()
                    break
                except OSError:
                    if server.poll() is not None:
                        log.seek(0)
                        sys.exit(log.read()[-3000:].decode())
                    time.sleep(0.2)
            found = {"seconds": [], "first_ms": []}
            for number in range(-1, job["rounds"]):
                times = [[] for _ in job["requests"]]
                began = time.perf_counter()
                clients = [
                    threading.Thread(target=ask, args=(url, one, job["new_tokens"], began, own))
                    for one, own in zip(job["requests"], times, strict=True)
                ]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                if number >= 0:
                    found["seconds"].append(max(own[-1] for own in times))
                    found["first_ms"].append([1000 * own[0] for own in times])
            json.dump(found, sys.stdout)
        finally:
            server.terminate()
            server.wait(30)


main()
