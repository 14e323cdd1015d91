"""The routes that the docs and the examples show are routes."""

import re
from pathlib import Path

import pytest

from vllm_multilora.routing.routes_file import load_routes, parse_routes

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "routing").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_can_be_used(path):
    assert load_routes(path).targets


def test_the_docs_example_can_be_used():
    page = ROOT / "docs" / "routing.md"
    (text,) = re.findall(r"^```yaml\n(routes:\n.*?)^```$", page.read_text(), re.M | re.S)
    routes = parse_routes(page.name, text)
    assert list(routes.targets) == ["assistant", "support", "helper", "acme", "house"]
