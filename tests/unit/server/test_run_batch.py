"""`vllm run-batch` does not start with a request for a blend, which only the gateway makes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.run_batch import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.flag_values import from_cli_args


def start(batch: str) -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--input-file", batch, "--output-file", "out", "--enable-lora"])
    from_cli_args(lambda cls, args: SimpleNamespace(additional_config={}), AsyncEngineArgs, args)


def line(**body: object) -> str:
    url = "/v1/completions"
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})


@pytest.mark.parametrize("field", ["lora_blend", "lora\\u005fblend"], ids=["plain", "escaped"])
def test_batch_with_a_blend_when_it_starts_is_refused_by_its_line(
    tmp_path: Path, field: str
) -> None:
    batch = tmp_path / "batch.jsonl"
    asked = line(prompt="a", lora_blend={"acme": 1.0}).replace("lora_blend", field)
    batch.write_text(f"{line(prompt='a')}\n\n{asked}\n")
    with pytest.raises(ConfigError, match="line 3: found `lora_blend`"):
        start(str(batch))


def test_batch_that_only_speaks_of_blends_when_it_starts_is_taken(tmp_path: Path) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text(line(prompt='what is "lora_blend"?'))
    start(str(batch))
    start("https://example.com/batch.jsonl")


@pytest.mark.parametrize("content", ["[1]", "null", '{"body": null}', "{", '"lora_blend"'])
def test_batch_with_lines_that_are_no_requests_when_it_starts_is_left_to_vllm(
    tmp_path: Path, content: str
) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text(f'{content}\n{content} lora_blend "\\u"\n')
    start(str(batch))
