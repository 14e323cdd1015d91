"""verl's own code gives an engine's workers adapters as tensors, and its requests name them.

Both halves of an update are verl's: the trainer's sender, which fills buckets of shared memory, and
the extension of vLLM's workers. Between them stands what `vLLMHttpServer` calls: `collective_rpc`,
`reset_prefix_cache`, `list_loras` and `generate`. verl itself starts these processes with Ray.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.programs import ENVIRONMENT
from tests.serving.engine import greedy, running_async_engine
from tests.serving.models.cases import Scenario
from tests.serving.slots.test_offline_calls import case_of

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = [pytest.mark.serving, pytest.mark.clients]

PACKAGES = ENVIRONMENT / "verl"
BUCKET_MB = 1
ACKNOWLEDGED_WITHIN_MS = 20_000
"""verl's sender waits for ever for workers that have failed."""


@pytest.fixture(scope="module", autouse=True)
def _verl_is_found() -> None:
    """Here and in the engine's processes, after everything that is installed beside vLLM."""
    if not PACKAGES.exists():
        raise FileNotFoundError(f"{PACKAGES} is missing: `make test-clients` installs it")
    sys.path.append(str(PACKAGES))


@pytest.fixture(autouse=True)
def _it_runs_on_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VERL_RAY_JOB_ID", tmp_path.name)  # part of its sockets' names
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "tests.clients.scripts.verl_on_cpus")


@pytest.fixture
def noted(tried: Callable[[str, str], None]) -> None:
    [version] = [each.version for each in distributions(name="verl", path=[str(PACKAGES)])]
    tried("verl, sender and extension of workers", version)


def by_fsdp(folder: Path) -> dict[str, Any]:
    """An adapter's configuration as verl's FSDP engine sends it."""
    from peft import LoraConfig

    config: dict[str, Any] = LoraConfig.from_pretrained(str(folder)).to_dict()
    return config


def by_megatron(folder: Path) -> dict[str, Any]:
    """The same as its Megatron engine sends it, for adapters of one rank and one scaling."""
    from verl.utils.megatron_peft_utils import build_peft_config_for_vllm

    config = by_fsdp(folder)
    sent: dict[str, Any] = build_peft_config_for_vllm(
        {"rank": config["r"], "alpha": config["lora_alpha"]}
    )
    return sent


def is_plain(folder: Path) -> bool:
    """Whether Megatron's configuration says all of an adapter's."""
    config = by_fsdp(folder)
    return not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))


@asynccontextmanager
async def running(scenario: Scenario) -> "AsyncIterator[AsyncLLM]":
    extension = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
    options = {"max_loras": 1, "worker_extension_cls": extension, "seed": 0}
    with running_async_engine(scenario.base, **options) as engine:
        yield engine


async def update(
    engine: "AsyncLLM", folder: Path, config: dict[str, Any], factor: float = 1.0
) -> None:
    """`ServerAdapter.update_weights`: workers are called, then sent an adapter's tensors."""
    import zmq
    from safetensors.torch import load_file
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    def send(to: str) -> None:
        sender = BucketedWeightSender(zmq_handle=to, bucket_size_mb=BUCKET_MB, use_shm=True)
        sender.zmq_context = zmq.Context()
        sender.zmq_context.setsockopt(zmq.RCVTIMEO, ACKNOWLEDGED_WITHIN_MS)
        tensors = load_file(folder / "adapter_model.safetensors")
        asyncio.run(sender.async_send_weights((n, t * factor) for n, t in tensors.items()))

    address = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"
    arguments = {"peft_config": config, "base_sync_done": True, "use_shm": True}
    called = asyncio.create_task(engine.collective_rpc("update_weights_from_ipc", kwargs=arguments))
    sent = asyncio.create_task(asyncio.to_thread(send, address))
    try:
        await called
    finally:
        await asyncio.gather(sent, return_exceptions=True)
    sent.result()
    await engine.reset_prefix_cache(reset_connector=True)


async def answer(engine: "AsyncLLM", prompt: tuple[int, ...], number: int) -> tuple[int, ...]:
    """`vLLMHttpServer.generate`: its adapter is named if the engine lists it."""
    from verl.workers.rollout.vllm_rollout.utils import (
        VLLM_LORA_INT_ID,
        VLLM_LORA_NAME,
        VLLM_LORA_PATH,
    )
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    lora = None
    if VLLM_LORA_INT_ID in await engine.list_loras():
        lora = LoRARequest(
            lora_name=VLLM_LORA_NAME, lora_int_id=VLLM_LORA_INT_ID, lora_path=VLLM_LORA_PATH
        )
    outputs = [
        output
        async for output in engine.generate(
            prompt=TokensPrompt(prompt_token_ids=list(prompt), multi_modal_data={}),
            sampling_params=greedy(logprobs=0, repetition_penalty=1.0),
            request_id=f"request-{number}",
            lora_request=lora,
            priority=0,
        )
    ]
    return tuple(outputs[-1].outputs[0].token_ids)


@pytest.mark.usefixtures("noted")
@pytest.mark.proves("each update answers as PEFT does, the base model before the first")
@pytest.mark.parametrize("configured", [by_fsdp, by_megatron])
def test_each_update_of_verls_answers_as_peft(
    llama: Scenario, configured: Callable[[Path], dict[str, Any]]
) -> None:
    async def steps() -> None:
        async with running(llama) as engine:
            base = next(iter(llama.cases_of(None)))
            assert await answer(engine, base.prompt, 0) == base.expected.tokens
            plain = [name for name, folder in llama.adapters.items() if is_plain(folder)]
            for number, name in enumerate(plain[:3], 1):
                folder, case = llama.adapters[name], case_of(llama, name)
                await update(engine, folder, configured(folder))
                assert await answer(engine, case.prompt, number) == case.expected.tokens

    asyncio.run(asyncio.wait_for(steps(), 120))


@pytest.mark.usefixtures("noted")
@pytest.mark.proves("an update with NaN is refused with the reason; the version before answers on")
def test_verl_is_refused_tensors_with_nan(llama: Scenario) -> None:
    async def steps() -> None:
        async with running(llama) as engine:
            name = next(iter(llama.adapters))
            folder, case = llama.adapters[name], case_of(llama, name)
            await update(engine, folder, by_fsdp(folder))
            with pytest.raises(Exception, match=r"lora_A\.weight has \d+ of \d+ values NaN"):
                await update(engine, folder, by_fsdp(folder), float("nan"))
            assert await answer(engine, case.prompt, 0) == case.expected.tokens

    asyncio.run(asyncio.wait_for(steps(), 120))
