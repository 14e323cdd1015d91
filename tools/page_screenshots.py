"""Makes the pictures of the status page in docs/images.

    python -m tools.page_screenshots                        # of a server of its own, under load
    python -m tools.page_screenshots --url http://HOST:8000 --output FILE.png [--dark] [--width 400]

The server of its own serves the demo's four adapters to the customers of three tenants; one of them
has an adapter that cannot be loaded. Needs the demo's extra and a Chromium; takes two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from PIL import Image

from tools.browser import Browser, browser_program
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.tenants.keys import stored

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples/demo"
OUTPUT = ROOT / "docs/images/status-page.png"
STYLES = ("code-review", "french-support", "legal", "medical")
CUSTOMERS = {"acme": 3, "globex": 2, "initech": 2}
"""Each tenant's customers; each of these has an adapter of every style."""
BROKEN = "initech-2-medical"
ADMIN_KEY = "sk-admin-of-the-pictures"
LOAD_S = 75.0
COLOURS = 128  # enough for text and a few tints, and a fraction of the bytes
START_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0


def write_adapters(folder: Path) -> list[str]:
    """Puts every customer's adapters into a folder, and returns their names."""
    names = [
        f"{tenant}-{customer}-{style}"
        for tenant, count in CUSTOMERS.items()
        for customer in range(1, count + 1)
        for style in STYLES
    ]
    for name in names:
        shutil.copytree(DEMO / "adapters" / name.split("-", 2)[2], folder / name)
    (folder / BROKEN / "adapter_model.safetensors").unlink()
    return names


def write_tenants(file: Path) -> None:
    """Writes who may use which adapters, and how much."""
    limits = {
        "acme": {"running": 8, "waiting": 32, "tokens_per_minute": 60_000},
        "globex": {"running": 4, "waiting": 16, "adapters": 4},
        "initech": {"running": 2, "waiting": 8},
    }
    tenants = {
        name: {
            "keys": [stored(f"sk-{name}")],
            "adapters": [f"{name}-*"],
            "weight": 2 if name == "acme" else 1,
            "limits": limits[name],
        }
        for name in CUSTOMERS
    }
    file.write_text(json.dumps({"tenants": tenants}))


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[str]:
    """A server with the demo's base model and the tenants' adapters; its address.

    Raises:
        SystemExit: It does not start.
    """
    sys.path.insert(0, str(DEMO))
    from base_model import build_base_model

    write_tenants(folder / "tenants.json")
    (folder / "admin-key").write_text(ADMIN_KEY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(build_base_model())),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--enable-lora", "--max-loras", "8", "--max-lora-rank", "32"),
        *("--multilora-adapter-dir", str(folder / "adapters"), "--multilora-pin", "acme-1-legal"),
        *("--multilora-cpu-cache-gib", "0.5", "--multilora-tenants", str(folder / "tenants.json")),
        *("--multilora-admin-key-file", str(folder / "admin-key")),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
        FOLDER_VARIABLE: str(folder / "store"),  # other servers' adapters are not in the picture
    }
    log = folder / "vllm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not _is_ready(url):
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise SystemExit(f"the server did not start; its log ends with:\n{tail}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def load(url: str, names: list[str]) -> Iterator[None]:
    """Has two clients of each tenant ask its adapters, some often, while the block runs."""
    ended = threading.Event()

    def ask(tenant: str, seed: int) -> None:
        choice = random.Random(f"{tenant} {seed}")
        mine = [name for name in names if name.startswith(tenant)]
        weights = [1 / (place + 1) ** 1.3 for place in range(len(mine))]
        headers = {"authorization": f"Bearer sk-{tenant}"}
        with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers) as client:
            while not ended.is_set():
                (name,) = choice.choices(mine, weights)
                body = {"model": name, "prompt": "Hello", "max_tokens": choice.randint(2, 12)}
                client.post("/v1/completions", json=body)

    clients = [
        threading.Thread(target=ask, args=(tenant, seed)) for tenant in CUSTOMERS for seed in (1, 2)
    ]
    broken = {"model": BROKEN, "prompt": "Hello"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        client.post("/v1/completions", json=broken, headers=headers)
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in clients:
            thread.join()


def main() -> int:
    """Takes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", default=ADMIN_KEY, help="the key that the page is given, if asked")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--seconds", type=float, default=LOAD_S, help="that the page is open")
    arguments = parser.parse_args()
    program = browser_program()
    if program is None:
        raise SystemExit("no Chromium on the path (Debian package chromium-headless-shell)")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        url = arguments.url
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="page-")))
            names = write_adapters(folder / "adapters")
            url = stack.enter_context(own_server(folder))
            stack.enter_context(load(url, names))
        browser = stack.enter_context(Browser(program))
        page = browser.page(arguments.width, dark=arguments.dark)
        page.open(f"{url}/multilora")
        page.until("listing || needsKey")
        if page.evaluate("needsKey"):
            page.evaluate(f"$('key').value = {json.dumps(arguments.key)}; useKey()")
            page.until("listing")
        time.sleep(arguments.seconds)
        page.evaluate(f"$('server').textContent = {json.dumps('localhost:8000')}")
        page.picture(arguments.output)
    with Image.open(arguments.output) as picture:
        picture.quantize(COLOURS).save(arguments.output, optimize=True)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1024:.0f} KiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
