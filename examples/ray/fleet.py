"""Adapters of a bucket, served by Ray Serve LLM with this plugin in its vLLM.

    make ray

Starts a bucket on this machine (moto), puts the demo's adapters into it, and serves them with the
demo's base model by one replica. Asks each customer's question, and serves until Ctrl-C.
"""

import argparse
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import httpx

DEMO = Path(__file__).parents[1] / "demo"
sys.path.append(str(DEMO))

from base_model import build_base_model  # noqa: E402
from processes import started  # noqa: E402
from prompts import ADAPTED, ADAPTERS, CUSTOMERS, MAX_LORA_RANK, Customer  # noqa: E402

BUCKET, BASE, OWNER = "adapters", "base", "acme"
START_LIMIT_S = 300.0
NEW_TOKENS = 40
FILES = ("adapter_config.json", "adapter_model.safetensors")
_POLL_S = 0.5
_OF_VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Fleet:
    """A bucket, and Ray Serve LLM with one replica; they run until the block ends.

    Args:
        model: The base model's folder.

    Attributes:
        url: Where clients ask.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._stack = ExitStack()
        bucket_port, port = _free_ports(2)
        self._bucket_url = f"http://127.0.0.1:{bucket_port}"
        self._port = port
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        access = {
            "AWS_ENDPOINT_URL": self._bucket_url,
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", **access})
        try:
            program = str(Path(sys.executable).with_name("moto_server"))
            port = self._bucket_url.rpartition(":")[2]
            bucket = self._stack.enter_context(started("bucket", [program, "-p", port]))
            self._await(f"{self._bucket_url}/moto-api/", bucket.check)
            self._s3 = boto3.client("s3")
            self._s3.create_bucket(Bucket=BUCKET)
            self._serve({**_OF_VLLM, **access})
            self._await(f"{self.url}/v1/models", bucket.check)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _serve(self, environment: dict[str, str]) -> None:
        """Starts Ray, and the application on it."""
        import ray
        from ray import serve
        from ray.serve.llm import LLMConfig, build_openai_app

        # Two processors a replica, and some for what is in front of it.
        ray.init(num_cpus=4, num_gpus=0, object_store_memory=100_000_000, include_dashboard=False)
        self._stack.callback(ray.shutdown)
        config = LLMConfig(
            model_loading_config={"model_id": BASE, "model_source": str(self._model)},
            lora_config={
                "dynamic_lora_loading_path": f"s3://{BUCKET}",
                "max_num_adapters_per_replica": 8,
            },
            accelerator_config={"kind": "cpu"},
            deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 1}},
            engine_kwargs={
                "dtype": "float32",
                "max_model_len": 512,
                "enforce_eager": True,
                "enable_lora": True,
                "max_loras": 2,
                "max_cpu_loras": 8,
                "max_lora_rank": MAX_LORA_RANK,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 512,
                # The plugin's settings: "additional_config": {"multilora": {...}}
            },
            runtime_env={"env_vars": environment},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})
        self._stack.callback(serve.shutdown)
        ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
        serve.run(
            build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress}),
            name="adapters",
        )

    def put(self, name: str, folder: Path) -> None:
        """Puts an adapter's files into the bucket."""
        for file in FILES:
            self._s3.upload_file(str(folder / file), BUCKET, f"{OWNER}:{name}/{file}")

    def ask(self, customer: Customer, adapter: str | None = None, **fields: Any) -> httpx.Response:
        """Asks a customer's question of its own adapter, or of another one."""
        adapter = adapter or customer.adapter
        body = {
            "model": f"{BASE}:{OWNER}:{adapter}" if adapter else BASE,
            "messages": [{"role": "user", "content": customer.prompt}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            **fields,
        }
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=120.0, trust_env=False)

    def _await(self, url: str, check: Any) -> None:
        end = time.monotonic() + START_LIMIT_S
        while True:
            check()
            try:
                if httpx.get(url, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > end:
                raise SystemExit(f"{url} has not answered within {START_LIMIT_S:.0f} s")
            time.sleep(_POLL_S)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end when all questions are answered")
    once = parser.parse_args().once
    print("Starting a bucket and Ray Serve LLM ...", flush=True)
    with Fleet(build_base_model()) as fleet, ThreadPoolExecutor(len(CUSTOMERS)) as threads:
        for customer in ADAPTED:
            fleet.put(str(customer.adapter), ADAPTERS / str(customer.adapter))
        answers = threads.map(fleet.ask, CUSTOMERS)
        for customer, answer in zip(CUSTOMERS, answers, strict=True):
            text = answer.raise_for_status().json()["choices"][0]["message"]["content"]
            print(f"\n{customer.adapter or BASE}: {customer.prompt}\n  {text!r}")
        print(f"\n{fleet.url} serves {BASE} and {BASE}:{OWNER}:NAME", flush=True)
        try:
            while not once:
                time.sleep(1)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
