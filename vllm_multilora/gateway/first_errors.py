"""Finds the first errors of a body with many values, before vLLM lists all of them.

vLLM says of each item of a list what is wrong with it, for each kind of item that there might be.
Of five thousand in `/v1/responses`, which are fifteen kilobytes, it takes seconds for that, in
which nobody is answered, and six gigabytes of memory.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic_core import SchemaValidator, ValidationError

from vllm_multilora.gateway.fields import FieldError

logger = logging.getLogger(__name__)

MIN_VALUES = 64
"""Values of a body, at least, that has its errors looked for. vLLM may list those of fewer."""

_OF_MANY = ("list", "tuple", "set", "frozenset", "dict")
_NOT_OF_SCHEMA = ("default", "metadata")


class FirstErrors:
    """Validates bodies as FastAPI does for vLLM, each list and object up to its first error.

    Args:
        routes: Those of vLLM's application.
    """

    def __init__(self, routes: list[Any]) -> None:
        self._validators: dict[str, SchemaValidator] = {}
        for route in routes:
            dependant = getattr(route, "dependant", None)
            fields = [] if dependant is None else dependant.body_params
            if len(fields) != 1:
                continue
            if (adapter := getattr(fields[0], "_type_adapter", None)) is None:
                logger.warning("vLLM says of all in a list what is wrong: FastAPI is not as known.")
                return
            schema = _failing_fast(adapter.core_schema)
            self._validators[route.path] = SchemaValidator(schema, _use_prebuilt=False)

    def check(self, path: str, body: bytes) -> None:
        """Looks for an error in the body of a call.

        Raises:
            FieldError: There is one, which vLLM would refuse the call for.
        """
        validator = self._validators.get(path)
        if validator is None or body.count(b",") + body.count(b":") < MIN_VALUES:
            return
        try:
            validator.validate_python(json.loads(body))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            where, what = ".".join(map(str, found[0]["loc"])), found[0]["msg"]
            count = f"{len(found)} validation errors in the body, the first"
            raise FieldError(f"{count} at `{where}`: {what}.") from None
        except Exception:  # vLLM's own, which its answer says more about
            logger.debug("A body is left to vLLM's own checks.", exc_info=True)


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
