"""Who is answered, by the keys that a server has and the key that came."""

from http import HTTPStatus
from itertools import product

import pytest

from vllm_multilora.gateway.endpoints import endpoint_of
from vllm_multilora.tenants.rules import Endpoint, Locks, Role, refusal

API = Locks(api_key=True, admin_key=False, tenants=False)
ADMIN = Locks(api_key=False, admin_key=True, tenants=False)
BOTH = Locks(api_key=True, admin_key=True, tenants=False)
TENANTS = Locks(api_key=True, admin_key=True, tenants=True)
ALL = (API, ADMIN, BOTH, TENANTS)


def answer(locks, role, method, path):
    found = refusal(locks, role, endpoint_of(method, path), path)
    return 200 if found is None else found.value


@pytest.mark.parametrize("path", ["/health", "/ping", "/health/", "/multilora", "/multilora/"])
def test_health_and_the_page_without_data_are_everybodys(path):
    for locks, role in product(ALL, Role):
        assert answer(locks, role, "GET", path) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter/"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/acme"),
        ("PUT", "/adapters/acme/"),
    ],
)
def test_only_operators_load_and_unload(method, path):
    for locks in ALL:
        assert answer(locks, Role.STRANGER, method, path) == 401
        assert answer(locks, Role.OPERATOR, method, path) == 200
        assert answer(locks, Role.CLIENT, method, path) == 403
        assert answer(locks, Role.TENANT, method, path) == 403


def test_strangers_see_no_adapters():
    assert {answer(locks, Role.STRANGER, "GET", "/v1/lora_adapters") for locks in ALL} == {401}


@pytest.mark.parametrize(("locks", "status"), [(API, 401), (ADMIN, 200), (BOTH, 401)])
def test_sagemakers_routes_are_as_open_as_vllms(locks, status):
    """VLLM itself guards /v1 with its key, and nothing where it has none."""
    assert answer(locks, Role.STRANGER, "POST", "/invocations") == status
    assert answer(locks, Role.STRANGER, "POST", "/v1/completions") == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/tokenize", "/metrics", "/docs", "/", "/v1/realtime", "/version"),
        *("/multilora/x", "/multilorax"),
    ],
)
def test_with_tenants_nothing_else_is_open(path):
    assert answer(TENANTS, Role.STRANGER, "GET", path) == 401
    assert answer(TENANTS, Role.CLIENT, "GET", path) == 200


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/responses/resp_1/cancel", Endpoint.OTHER),
        ("/v1/responses/brand-new", Endpoint.OTHER),
        ("/score", Endpoint.CALL),
        ("/generative_scoring", Endpoint.OTHER),
        ("/v1/completions/render", Endpoint.OTHER),
        ("/inference/v1/abort_requests", Endpoint.OTHER),
        ("/abort_requests", Endpoint.OTHER),
        ("/v1/models", Endpoint.OTHER),
        ("/collective_rpc", Endpoint.OTHER),
        ("/v1/brand/new", Endpoint.OTHER),
        ("/adaptersx", Endpoint.OTHER),
        ("/v1/completionsx", Endpoint.OTHER),
    ],
)
def test_what_is_not_known_is_no_tenants(path, endpoint):
    assert endpoint_of("POST", path) is endpoint
    expected = 200 if endpoint is Endpoint.CALL else HTTPStatus.FORBIDDEN
    assert answer(TENANTS, Role.TENANT, "POST", path) == expected


def test_folders_are_shown_to_operators_where_there_are_any():
    assert API.shows_folders(Role.STRANGER)
    for locks in (ADMIN, BOTH, TENANTS):
        shown = {role for role in Role if locks.shows_folders(role)}
        assert shown == {Role.OPERATOR}
