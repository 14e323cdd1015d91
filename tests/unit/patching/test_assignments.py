"""Every attribute of vLLM's objects that our code assigns is in a table, or in a list of fields."""

import ast
from collections.abc import Iterator
from pathlib import Path

import vllm_multilora
from vllm_multilora.integration.patching.tables.replaced import REPLACED

FOLDER = Path(vllm_multilora.__file__).parent
PLACES = ("gateway", "integration", "tenants")

OURS = {
    *("STOP", "asked", "deferred_calls", "beam", "call", "caller", "entry", "kept", "known"),
    *("mapping", "meter", "own", "prompt", "prompts", "served", "under_way", "usage", "waiting"),
}
"""Variables that hold objects of our own classes wherever one of their attributes is assigned."""

OURS_HERE = {
    ("integration.engine.adapters.adapter_machine", "each"),
    ("integration.engine.adapters.engine_adapters", "adapter"),
    ("integration.engine.adapters.engine_adapters", "load"),
    ("integration.engine.adapters.known_adapters", "adapter"),
    ("integration.engine.adapters.known_adapters", "blend"),
    ("integration.worker.sampling", "manager"),
}
"""Variables that hold objects of our own classes in these modules."""

PYTHONS = {"made", "owner", "record", "timer", "known"}
"""Variables that hold classes that we make, log records, timers, and what state is attached to."""

NOT_READ = {"integration.patching." + name for name in ("patch", "post_import", "source")}
"""Modules that patch by name, or change Python's modules and syntax trees."""

FIELDS = {
    ("gateway.names.models_list", "card.created"),
    ("gateway.names.models_list", "card.digest"),
    ("gateway.names.models_list", "card.kind"),
    ("gateway.names.models_list", "seen.lora_requests"),
    ("gateway.names.models_list", "shown.data"),
    ("integration.api_server.failure_delivery", "completion.logprobs"),
    ("integration.api_server.failure_delivery", "output.error"),
    ("integration.api_server.failure_delivery", "output.pooling_output"),
    ("integration.api_server.failure_delivery", "output.stop_reason"),
    ("integration.api_server.failure_delivery", "state.streaming_input"),
    ("integration.engine.executor", "scheduler_config.scheduler_cls"),
    ("integration.engine.requests.invocation", "request.lora_request"),
    ("integration.engine.scheduling.scheduler", "request.lora_request"),
    ("integration.engine.requests.tenant_wall", "request.cache_salt"),
    ("integration.engine.requests.tenant_wall", "request.priority"),
    ("integration.engine.requests.weight_versions", "request.trace_headers"),
    ("integration.logs", "logging.getLogger(name).parent"),
    ("integration.offline.costs", "lora_config.max_lora_rank"),
    ("integration.offline.costs", "lora_config.max_loras"),
    ("integration.offline.costs", "manager.lora_config"),
    ("integration.offline.model_without_weights", "XIELU.__init__"),
    ("integration.offline.model_without_weights", "group.world_size"),
    ("integration.offline.model_without_weights", "method.moe_kernel"),
    ("integration.offline.model_without_weights", "method.moe_quant_config"),
    ("integration.settings.cache_settings", "lora_config.max_cpu_loras"),
    ("integration.settings.flags", "args.additional_config"),
    ("integration.settings.flags", "engine_args.additional_config"),
    ("integration.server.requests.metering", "output.pooling_output"),
    ("integration.server.names.model_names", "shown.error.message"),
    ("integration.server.names.model_names", "shown.error.problems"),
    ("integration.server.settings.gateway_activation", "args.middleware"),
    ("integration.server.names.resolvers", "lora.lora_int_id"),
    ("integration.server.settings.gateway_activation", "args.trust_request_chat_template"),
    ("integration.step.punica_moe", "lora_config.specialize_active_lora"),
    ("integration.worker.base_layers.base_products", "layer.weight"),
    ("integration.worker.slots.model_manager", "fused.lora_b"),
    ("integration.worker.slots.model_manager", "module.lora_a_stacked"),
    ("integration.worker.slots.model_manager", "module.lora_b_stacked"),
    ("integration.worker.slots.special", "lora.lora_b"),
    ("integration.worker.slots.special", "lora.rank"),
    ("integration.worker.slots.special", "lora.scaling"),
    ("integration.worker.slots.special", "special.is_3d_lora_weight"),
}
"""Fields of the data of vLLM and its libraries that are filled in or corrected. This list may only
get shorter."""


def assigned() -> Iterator[tuple[str, str]]:
    """Module and target of each assignment to an attribute of an object that is not ours."""
    for place in PLACES:
        for file in sorted((FOLDER / place).rglob("*.py")):
            module = ".".join(file.relative_to(FOLDER).with_suffix("").parts)
            if module in NOT_READ:
                continue
            tree = ast.parse(file.read_text())
            ours = set(_of_own_instances(module, tree))
            for node in ast.walk(tree):
                is_stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
                if isinstance(node, ast.Attribute) and is_stored and node not in ours:
                    yield module, ast.unparse(node)


def _of_own_instances(module: str, tree: ast.Module) -> Iterator[ast.Attribute]:
    """The assigned attributes of our own objects: of `self` in a class, or of a known variable."""
    for owner in ast.walk(tree):
        in_class = isinstance(owner, ast.ClassDef)
        for node in ast.walk(owner) if in_class or isinstance(owner, ast.Module) else ():
            if isinstance(node, ast.Attribute):
                names = set(ast.unparse(node.value).replace("[", ".").split("."))
                is_known = names & (OURS | PYTHONS) or {(module, n) for n in names} & OURS_HERE
                if is_known or (in_class and "self" in names):
                    yield node


def test_what_is_assigned_to_vllms_objects_is_in_a_table():
    replaced = {(each.module, each.written) for each in REPLACED}
    found = set(assigned())
    unknown = found - replaced - FIELDS
    assert not unknown, (
        "use what vLLM offers, or add it to patching/tables/replaced.py with its reason"
    )
    assert not (replaced | FIELDS) - found, "gone: take these out of the table or the list"


def test_every_replaced_attribute_says_why_and_until_when():
    for each in REPLACED:
        assert ":" in each.target
        assert each.why.endswith(".")
        assert each.until.endswith(".")
