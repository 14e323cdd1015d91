"""The JSON object in an `adapter_config.json`."""

from __future__ import annotations

from typing import Any

from vllm_multilora.adapters.json_text import JsonTooLargeError, parse_json
from vllm_multilora.adapters.problems import Code, Problem, shown_name

_MOST_PARTS = 200_000  # of lists, objects and values; 20,000 patterns with a rank each have 40,000


def read_object(text: str | bytes, where: str) -> dict[str, Any] | Problem:
    """Parses a configuration; what is wrong with it as JSON becomes a problem.

    Args:
        text: The file's content.
        where: What problems call it, such as its path.
    """
    # As PEFT and vLLM read it; `json` alone would take other encodings of bytes too.
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        raw = parse_json(content, parts=_MOST_PARTS, values=_MOST_PARTS)
    except JsonTooLargeError as error:
        most = f"at most {error.most}"
        return Problem.at(Code.FILE_TOO_LARGE, where, "", error.found, most, verb="has")
    except ValueError as error:
        return Problem.at(
            Code.CONFIG_NOT_JSON,
            where,
            "",
            f"not valid JSON: {shown_name(str(error))}",
            "what PEFT's save_pretrained writes",
            hint="save the adapter again",
        )
    if not isinstance(raw, dict):
        return Problem.at(
            Code.CONFIG_NOT_JSON,
            where,
            "",
            f"a JSON {type(raw).__name__}",
            "an object with the keys 'r', 'lora_alpha' and 'target_modules'",
            verb="holds",
        )
    return raw
