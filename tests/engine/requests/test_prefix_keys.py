"""What a request's blocks and images are called, before its adapter has been read and after."""

from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request, RequestStatus

from tests.engine.fake_engine import pack_info
from tests.engine.scheduling.fake_scheduler import AwareScheduler
from tests.engine.scheduling.test_scheduler import config
from vllm_multilora.integration.activated import ActivatedLoRARequest, last_occurrence
from vllm_multilora.integration.engine.requests import invocation, prefix_keys
from vllm_multilora.store.protocol.messages import PackInfo

BLOCK = 4
TOKENS = list(range(3 * BLOCK))


@pytest.fixture(autouse=True)
def keys_of_ours(monkeypatch):
    of_block = kv_cache_utils.generate_block_hash_extra_keys
    of_block = getattr(of_block, "__wrapped__", of_block)
    monkeypatch.setattr(
        kv_cache_utils,
        "generate_block_hash_extra_keys",
        partial(prefix_keys.block_hash_keys, of_block),
    )
    monkeypatch.setattr(
        "vllm_multilora.integration.engine.scheduling.scheduler.engine_recorder", lambda _: None
    )
    init_none_hash(sha256)


class Digests:
    """An engine's adapters: the digests that are known, by number.

    Attributes:
        invocation: The tokens that activate them.
    """

    def __init__(self, *, invocation: tuple[int, ...] = (), **digests: str) -> None:
        self.digests = {int(number[1:]): digest for number, digest in digests.items()}
        self.invocation = invocation

    def version(self, number: int) -> PackInfo | None:
        digest = self.digests.get(number)
        if digest is None:
            return None
        return msgspec.structs.replace(pack_info(1, digest), invocation_tokens=self.invocation)


def arrived(lora=None, adapters: Digests | None = None, images=(), tokens=TOKENS) -> Request:
    """A client's request as an engine core makes one of it."""
    scheduler = AwareScheduler(vllm_config=config(2))
    if adapters is not None:
        scheduler.attach_adapters(adapters)
    hasher = get_request_block_hasher(BLOCK, sha256)
    sent = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(tokens),
        mm_features=list(images) or None,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=lora,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return Request.from_engine_core_request(sent, hasher)


IMAGE = MultiModalFeatureSpec(None, "image", "image", PlaceholderRange(0, 2), "image")


def lora(name="a", number=1) -> LoRARequest:
    return LoRARequest(name, number, f"/adapters/{name}")


def test_blocks_are_hashed_on_arrival_where_the_weights_are_known():
    request = arrived(lora(), Digests(_1="d"))
    assert len(request.block_hashes) == 3
    hashes = list(request.block_hashes)
    assert prefix_keys.set_version(request, "d")
    assert request.block_hashes == hashes
    assert arrived(lora("other", 5), Digests(_5="d")).block_hashes == hashes
    assert not {*arrived(lora(), Digests(_1="e")).block_hashes} & {*hashes}
    assert not {*arrived().block_hashes} & {*hashes}


@pytest.mark.parametrize(
    "adapters",
    [None, Digests(), Digests(_1="old")],
    ids=["first-request", "unknown", "changed"],
)
def test_blocks_are_hashed_again_once_the_weights_are_known(adapters):
    request = arrived(lora(), adapters)
    assert prefix_keys.set_version(request, "d")
    assert request.block_hashes == arrived(lora(), Digests(_1="d")).block_hashes
    request.append_output_token_ids(list(range(BLOCK)))
    assert len(request.block_hashes) == 4


def test_what_old_weights_have_computed_is_not_mixed_with_new_ones():
    request = arrived(lora(), Digests(_1="old"))
    request.num_computed_tokens = BLOCK
    assert prefix_keys.set_version(request, "old")
    assert not prefix_keys.set_version(request, "new")


def test_an_answer_that_old_weights_have_begun_does_not_go_on_with_new_ones():
    """Even where its prompt is to be computed again: what has been answered was theirs."""
    request = arrived(lora(), Digests(_1="old"))
    request.append_output_token_ids([7])
    request.status = RequestStatus.PREEMPTED
    assert not prefix_keys.set_version(request, "new")
    assert prefix_keys.set_version(request, "old")


def test_blocks_of_two_versions_have_keys_that_neither_version_has():
    """A swap in flight after six tokens, in blocks of four."""
    request = arrived(lora(), Digests(_1="old"))
    old, new = (arrived(lora(), Digests(_1=each)).block_hashes for each in ("old", "new"))
    request.num_computed_tokens = BLOCK + 2
    prefix_keys.go_on(request, "new")
    request.append_output_token_ids(list(range(BLOCK)))
    kept, *mixed = request.block_hashes
    assert kept == old[0]
    assert len(mixed) == 3
    assert not {*mixed} & {*old, *new}
    request.num_computed_tokens, request.status = 0, RequestStatus.PREEMPTED
    assert prefix_keys.set_version(request, "new", goes_on=True)
    assert request.block_hashes[:3] == new


def test_images_of_a_preempted_request_may_go_on_with_other_weights():
    request = arrived(lora(), Digests(_1="d"), [IMAGE])
    assert [f.identifier for f in request.mm_features] == ["image"]
    request.status = RequestStatus.PREEMPTED
    assert prefix_keys.set_version(request, "e")


def test_an_adapter_that_vllm_loads_itself_has_its_keys():
    request = arrived(lora(), Digests(_1="another engine's"))
    prefix_keys.use_stock_keys(request)
    assert len(request.block_hashes) == 3
    assert request.block_hashes == arrived(lora(), None).block_hashes
    assert request.block_hashes != arrived(lora(), Digests(_1="d")).block_hashes


INVOCATION = (1, 2)
PROMPTS = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=4 * BLOCK)


def activated(tokens, digest="d") -> Request:
    return arrived(lora(), Digests(_1=digest, invocation=INVOCATION), tokens=tokens)


def invoked_at(tokens) -> int | None:
    """The last occurrence of the invocation, looked for in the plainest way."""
    places = range(len(tokens) - len(INVOCATION), -1, -1)
    return next((i for i in places if tuple(tokens[i : i + 2]) == INVOCATION), None)


def content_of(tokens, block: int) -> tuple:
    """All that decides on a block of an activated request: tokens, and which are the adapter's."""
    end, start = (block + 1) * BLOCK, invoked_at(tokens)
    assert start is not None
    return tuple(tokens[:end]), max(0, end - start)


def test_blocks_before_the_invocation_are_the_base_models_and_later_ones_the_adapters():
    tokens = [5] * (2 * BLOCK + 1) + [*INVOCATION] + [6] * (2 * BLOCK)
    base = arrived(tokens=tokens).block_hashes
    found = activated(tokens)
    assert len(found.block_hashes) == 4
    assert found.block_hashes[:2] == base[:2]
    assert not {*found.block_hashes[2:]} & {*base[2:]}
    other = activated(tokens, "e").block_hashes
    assert other[:2] == base[:2]
    assert not {*other[2:]} & {*found.block_hashes[2:]}
    assert not {*arrived(lora(), Digests(_1="d"), tokens=tokens).block_hashes} & {
        *found.block_hashes
    }
    start = 2 * BLOCK + 1
    assert isinstance(found.lora_request, ActivatedLoRARequest)
    assert found.lora_request.start == start
    found.append_output_token_ids([*INVOCATION] * BLOCK)  # generated: activates nothing anew
    assert found.block_hashes[:2] == base[:2]
    assert found.lora_request.start == start


def test_a_salt_keeps_tenants_apart_before_the_invocation_too():
    tokens = [5] * (2 * BLOCK) + [*INVOCATION]
    hashes = []
    for salt in (None, "acme", "globex"):
        request = activated(tokens)
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
        hashes += request.block_hashes
    assert len({*hashes}) == len(hashes) == 6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(PROMPTS, PROMPTS, PROMPTS)
@example([0, 1, 2, 1], [2, 0], [0, 0])  # in the first block at 1, or at 3 if a 2 follows
def test_blocks_of_one_key_hold_the_same_numbers(common, first, second):
    """Whatever the prompts have in common, and wherever each has its last invocation."""
    seen: dict[bytes, tuple] = {}
    for rest in (first, second):
        tokens = [*common, *rest]
        if invoked_at(tokens) is None:
            continue
        base = arrived(tokens=tokens).block_hashes
        for block, key in enumerate(activated(tokens).block_hashes):
            content = content_of(tokens, block)
            assert seen.setdefault(key, content) == content
            assert (key == base[block]) == (content[1] == 0)


def test_a_prompt_that_invokes_nothing_has_no_key_of_the_base_models():
    tokens = [1, 1, 0, 2] * BLOCK
    request = activated(tokens)
    assert not {*request.block_hashes} & {*arrived(tokens=tokens).block_hashes}
    assert not invocation.is_invoked(request, Digests(_1="d", invocation=INVOCATION).version(1))


def test_embeddings_in_the_place_of_tokens_invoke_nothing():
    pack = msgspec.structs.replace(pack_info(1), invocation_tokens=(5,))
    request = SimpleNamespace(prompt_token_ids=[4, 5, 6], prompt_embeds=None)
    assert invocation.is_invoked(request, pack)
    request = SimpleNamespace(prompt_token_ids=[4, 5, 6], prompt_embeds=object())
    assert not invocation.is_invoked(request, pack)


def test_an_adapter_that_becomes_a_plain_one_acts_on_everything():
    tokens = [5] * (2 * BLOCK) + [*INVOCATION]
    request = activated(tokens)
    plain = Digests(_1="plain").version(1)
    assert invocation.is_invoked(request, plain)
    assert prefix_keys.set_version(request, plain.digest)
    assert type(request.lora_request) is LoRARequest
    assert request.block_hashes == arrived(lora(), Digests(_1="plain"), tokens=tokens).block_hashes


@pytest.mark.parametrize(("by", "may_run"), [(INVOCATION, True), ((5,), False), ((), False)])
def test_a_prompt_that_begins_again_is_activated_where_it_was_or_not_at_all(by, may_run):
    request = activated([5] * (2 * BLOCK) + [*INVOCATION])
    request.status = RequestStatus.PREEMPTED  # a worker knows from where its adapter acts
    assert invocation.is_invoked(request, Digests(_1="e", invocation=by).version(1))
    assert prefix_keys.set_version(request, "e") == may_run


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 256, 1 << 24, (1 << 31) - 1]), max_size=24),
    st.lists(st.sampled_from([0, 1, 256, 1 << 24, (1 << 31) - 1]), min_size=1, max_size=3),
)
def test_the_last_occurrence_is_found_at_tokens_borders_alone(tokens, invocation):
    places = range(len(tokens) - len(invocation), -1, -1)
    expected = next((i for i in places if tokens[i : i + len(invocation)] == invocation), None)
    assert last_occurrence(tokens, invocation) == expected
