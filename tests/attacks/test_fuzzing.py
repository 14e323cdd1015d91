"""Whatever is sent to the routes for adapters, and named in a request: never 500, and no harm.

Bodies are of the routes' own schemas, in parts or altogether of others.

MULTILORA_TEST_FUZZ_EXAMPLES says how many calls are made; a few hundred take seconds, and 20,000
some minutes.
"""

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adapters.corpus import BAD
from tests.serving import completions

from .site import BASE, GOOD, HOSTILE_NAMES, STRANGE_NAMES, Site

pytestmark = pytest.mark.serving

EXAMPLES = int(os.environ.get("MULTILORA_TEST_FUZZ_EXAMPLES", "300"))
ROUTES = ("by-language", "by-user", "by-task", "by-header", "split")
FOLDERS = ("b-missing", "dora", "weights-empty", "config-a-pipe", "header-huge", "a-with-one-nan")

# Lone surrogates included: JSON can write them.
TEXTS = st.text(st.characters(), max_size=30) | st.sampled_from(
    [*HOSTILE_NAMES.values(), *STRANGE_NAMES.values(), "", " ", "null", "%00", "a" * 300]
)
NAMES = TEXTS | st.sampled_from([GOOD, BASE, *ROUTES, f"{GOOD}/", f"./{GOOD}"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
HEADERS = st.dictionaries(
    st.sampled_from(["accept-language", "x-task", "x-multilora-adapter", "x-request-id"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"))
    | st.builds("{}{}".format, st.sampled_from(["fr-", "q=", ",", "a-b;"]), st.just("x,-;" * 500)),
    max_size=3,
)
PATHS = TEXTS | st.sampled_from(
    ["{root}", "{root}/good-customer", "{root}/nobody", "/", "/proc/self"]
)
PATHS |= st.sampled_from([f"{{root}}/{name}" for name in FOLDERS]) | st.just("/" + "p/" * 3_000)

LOADS = st.fixed_dictionaries(
    {"lora_name": NAMES, "lora_path": PATHS},
    optional={"load_inplace": JSON, "is_3d_lora_weight": st.booleans(), "more": JSON},
)
UNLOADS = st.fixed_dictionaries({"lora_name": NAMES}, optional={"lora_int_id": JSON})
COMPLETIONS = st.fixed_dictionaries(
    {"model": NAMES, "prompt": st.just([1, 2, 3]), "max_tokens": st.just(1)},
    optional={"user": TEXTS | JSON, "metadata": JSON | st.dictionaries(st.just("task"), JSON)},
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | TEXTS, "content": TEXTS})
    | JSON,
    max_size=2,
)
CHATS = st.fixed_dictionaries(
    {"model": NAMES, "messages": MESSAGES | JSON, "max_tokens": st.just(1)},
    optional={"user": TEXTS | JSON, "metadata": JSON, "chat_template_kwargs": JSON},
)
SAGEMAKER_LOADS = st.fixed_dictionaries(
    {"name": NAMES, "src": PATHS}, optional={"preload": JSON, "pin": JSON}
)
CALLS = st.one_of(
    st.tuples(st.just("/v1/load_lora_adapter"), LOADS | JSON),
    st.tuples(st.just("/v1/unload_lora_adapter"), UNLOADS | JSON),
    st.tuples(st.just("/adapters"), SAGEMAKER_LOADS | JSON),
    st.tuples(st.just("/v1/completions"), COMPLETIONS | JSON),
    st.tuples(st.just("/v1/chat/completions"), CHATS | JSON),
    st.tuples(st.just("/invocations"), COMPLETIONS | CHATS),
)
LOADING = {"/v1/load_lora_adapter": ("lora_name", "lora_path"), "/adapters": ("name", "src")}


@pytest.fixture(scope="module")
def fuzzed(site: Site) -> Iterator[Site]:
    for name in FOLDERS:
        BAD[name].write(site.root / name)
    yield site
    site.assert_unharmed()
    completions.assert_serves(site.server, BASE, site.scenario.cases_of(None)[0])


@given(call=CALLS, headers=HEADERS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 1000,
    suppress_health_check=list(HealthCheck),
)
def test_no_call_is_answered_with_500(fuzzed: Site, call: tuple[str, Any], headers: Any) -> None:
    path, body = call
    name_of, path_of = LOADING.get(path, ("lora_name", "lora_path"))
    if isinstance(body, dict) and body.get(name_of) in (GOOD, *ROUTES, BASE):
        body = {key: value for key, value in body.items() if key != "load_inplace"}
        if path.endswith("unload_lora_adapter"):
            body["lora_name"] = "nobody"  # the good customer's own key would be needed for that
    if isinstance(body, dict) and isinstance(body.get(path_of), str):
        body = {**body, path_of: body[path_of].replace("{root}", str(fuzzed.root))}
    response = fuzzed.post(
        path, body, {key: value.encode("latin-1") for key, value in headers.items()}
    )
    assert response.status_code < 500 or is_passing(response), (
        f"{path} {body!a:.500} {headers!a:.500}: {response.status_code} {response.text[:500]}\n"
        f"{fuzzed.server.log_tail()}"
    )
    assert len(response.content) < 100_000
    if response.status_code == 200 and path in LOADING:
        assert fuzzed.unload(body[name_of]).status_code == 200


def is_passing(response: httpx.Response) -> bool:
    """Whether a later try may help: 503 with a reason."""
    return response.status_code == 503 and bool(response.json()["error"]["message"])


@given(name=NAMES.filter(lambda name: GOOD not in name))
@settings(
    max_examples=EXAMPLES // 3,
    deadline=None,
    derandomize=EXAMPLES <= 1000,
    suppress_health_check=list(HealthCheck),
)
def test_no_name_in_an_address_is_answered_with_500(fuzzed: Site, name: str) -> None:
    written = quote(name.encode("utf-8", "surrogatepass"), safe="").replace(".", "%2E")
    response = httpx.delete(f"{fuzzed.server.url}/adapters/{written}", timeout=60, trust_env=False)
    assert response.status_code < 500, f"{name!a}: {response.text[:500]}"
    assert len(response.content) < 100_000


@given(content=st.binary(max_size=200) | st.builds(lambda v: json.dumps(v).encode()[:-1], JSON))
@settings(
    max_examples=EXAMPLES // 3,
    deadline=None,
    derandomize=EXAMPLES <= 1000,
    suppress_health_check=list(HealthCheck),
)
def test_what_is_no_json_is_answered_with_400(fuzzed: Site, content: bytes) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        response = httpx.post(
            f"{fuzzed.server.url}{path}",
            content=content,
            headers={"content-type": "application/json"},
            trust_env=False,
            timeout=60,
        )
        assert response.status_code in (400, 404, 422), response.text[:500]


@pytest.mark.parametrize("query", ["", "?x=1", "?" + "a" * 5_000, "?%00%ff", "?adapter=../../etc"])
def test_the_listing_takes_no_input(fuzzed: Site, query: str) -> None:
    response = fuzzed.server.get(f"/v1/lora_adapters{query}")
    assert response.status_code == 200
    assert GOOD in {row["id"] for row in response.json()["data"]}
    assert fuzzed.server.post("/v1/lora_adapters", {}).status_code == 405
