"""Adapters of a bucket, served by Ray Serve LLM with this plugin in its vLLM.

    make ray

Starts a bucket on this machine (moto), puts the demo's adapters into it, and serves them with the
demo's base model by one replica. Asks each customer's question, and serves until Ctrl-C.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import boto3

sys.path.append(str(Path(__file__).parents[1]))

import fleets
from base_model import build_base_model
from demo import free_port
from fleets import BASE
from processes import started
from prompts import ADAPTED, ADAPTERS, MAX_LORA_RANK

BUCKET, OWNER = "adapters", "acme"
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Fleet(fleets.Fleet):
    """A bucket, and Ray Serve LLM with one replica; they run until the block ends.

    Args:
        model: The base model's folder.

    Attributes:
        url: Where clients ask.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._bucket_port, self._port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def open(self, stack: ExitStack) -> None:
        """Starts the bucket, Ray, and the application on it."""
        bucket = f"http://127.0.0.1:{self._bucket_port}"
        access = {
            "AWS_ENDPOINT_URL": bucket,
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", **access})
        program = str(Path(sys.executable).with_name("moto_server"))
        command = [program, "-p", str(self._bucket_port)]
        self.main = stack.enter_context(started("bucket", command))
        self.wait("bucket", lambda: fleets.is_up(f"{bucket}/moto-api/"))
        self._s3 = boto3.client("s3")
        self._s3.create_bucket(Bucket=BUCKET)
        self._serve(stack, {**fleets.SETTINGS, "VLLM_LOGGING_LEVEL": "WARNING", **access})
        self.wait("models", lambda: fleets.is_up(f"{self.url}/v1/models"))

    def model_of(self, adapter: str) -> str:
        """What clients call an adapter."""
        return f"{BASE}:{OWNER}:{adapter}"

    def _serve(self, stack: ExitStack, environment: dict[str, str]) -> None:
        import ray
        from ray import serve
        from ray.serve.llm import LLMConfig, build_openai_app

        # Two processors a replica, and some for what is in front of it.
        ray.init(num_cpus=4, num_gpus=0, object_store_memory=100_000_000, include_dashboard=False)
        stack.callback(ray.shutdown)
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
        stack.callback(serve.shutdown)
        ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
        serve.run(
            build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress}),
            name="adapters",
        )

    def put(self, name: str, folder: Path) -> None:
        """Puts an adapter's files into the bucket."""
        for file in FILES:
            self._s3.upload_file(str(folder / file), BUCKET, f"{OWNER}:{name}/{file}")


def main() -> None:
    """Runs the example."""
    stay = fleets.read_arguments(__doc__)
    print("Starting a bucket and Ray Serve LLM ...", flush=True)
    with Fleet(build_base_model()) as fleet:
        for customer in ADAPTED:
            fleet.put(str(customer.adapter), ADAPTERS / str(customer.adapter))
        fleets.show(fleet)
        print(f"\n{fleet.url} serves {BASE} and {fleet.model_of('NAME')}", flush=True)
        stay()


if __name__ == "__main__":
    main()
