"""Has vLLM name the first wrong item of a list in a body, and not all of them."""

from __future__ import annotations

import logging
from typing import Any

from pydantic_core import SchemaValidator

logger = logging.getLogger(__name__)

_OF_MANY = ("list", "tuple", "set", "frozenset", "dict")
_NOT_OF_SCHEMA = ("default", "metadata")


def stop_at_first_errors(app: Any) -> None:
    """Has a server look no further in a list or an object of any fields that holds something wrong.

    vLLM says of each item of a list what is wrong with it, for each kind of item that there might
    be: of five thousand in `/v1/responses`, which are fifteen kilobytes, it takes seconds for that,
    in which nobody is answered, and six gigabytes of memory.

    Args:
        app: vLLM's, with all its routes.
    """
    for route in app.routes:
        dependant = getattr(route, "dependant", None)
        for field in [] if dependant is None else dependant.body_params:
            if (adapter := getattr(field, "_type_adapter", None)) is None:
                logger.warning("vLLM says of all in a list what is wrong: FastAPI is not as known.")
                return
            adapter.validator = SchemaValidator(
                _failing_fast(adapter.core_schema), _use_prebuilt=False
            )


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_failing_fast(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value if key in _NOT_OF_SCHEMA else _failing_fast(value)
        for key, value in schema.items()
    }
    return {**made, "fail_fast": True} if made.get("type") in _OF_MANY else made
