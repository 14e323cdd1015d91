"""`GET /multilora`: what `GET /v1/lora_adapters` says, as a page for a browser.

A browser that opens an address sends no key. So the page is one static file, the same for everybody
and open to everybody, and reveals nothing about the server except that this plugin runs in it. It
gets all its data from the status route, which is protected as always, with a key that its reader
enters and that stays in the page's memory. What customers have written (adapters' names, reasons)
arrives as JSON and is inserted into the page as text. If that were ever forgotten, the policy below
would still keep it from running: only scripts with the right digest run, nothing is loaded from or
sent to other hosts, and text cannot become elements (`require-trusted-types-for`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration
from vllm_multilora.tenants.rules import STATUS_PAGE

_FILE = Path(__file__).with_name("page.html")


def add_route(app: FastAPI) -> None:
    app.add_api_route(STATUS_PAGE, show_page, methods=["GET"], include_in_schema=False)


async def show_page(raw_request: Request) -> HTMLResponse:
    """The page; 404 where the plugin does not act, or `status_page` is off."""
    models: Any = getattr(raw_request.app.state, "openai_serving_models", None)
    if registration.acts_for(models) and settings_of(models.engine_client.vllm_config).status_page:
        return HTMLResponse(page(), headers=headers())
    raise HTTPException(HTTPStatus.NOT_FOUND)


@cache
def page() -> str:
    return _FILE.read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """What goes with the page, so that a browser lets it do no more than it must."""
    policy = {
        "default-src": "'none'",
        "script-src": _digest("script"),
        "style-src": _digest("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return {
        "content-security-policy": "; ".join(f"{what} {who}" for what, who in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _digest(tag: str) -> str:
    """The only element of a kind in the page, as a policy names it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
