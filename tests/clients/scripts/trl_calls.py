"""The calls that TRL's AsyncGRPO makes of its own client, in the order of its trainer's steps."""

from typing import Any

from accelerate import PartialState
from client_call import main, outcome
from trl.experimental.async_grpo.vllm_client import VLLMClient


def client(task: dict[str, Any]) -> VLLMClient:
    return VLLMClient(task["url"], server_timeout=30)


def start(task: dict[str, Any]) -> dict[str, Any]:
    """What the trainer asks before its first step."""
    asked = client(task)
    asked.wait_for_server_ready()
    server = asked.get_server_info()
    return {
        "max_model_len": asked.get_max_model_len(),
        "dtype": asked.get_dtype(),
        "max_lora_rank": server["lora_config"]["max_lora_rank"],
        "max_loras": server["lora_config"]["max_loras"],
        "engines": server["parallel_config"]["data_parallel_size"],
        "world": asked.get_world_size(),
    }


def step(task: dict[str, Any]) -> None:
    """Puts a policy in the place of an older one, between two of the trainer's steps."""
    asked = client(task)
    asked.pause()
    asked.load_lora_adapter(task["name"], task["folder"])
    asked.resume()
    if task["old"]:
        asked.unload_lora_adapter(task["old"])


def refused(task: dict[str, Any]) -> dict[str, Any]:
    return outcome(lambda: client(task).load_lora_adapter(task["name"], task["folder"]))


PartialState(cpu=True)  # without it, the client's log lines fail
main(start, step, refused)
