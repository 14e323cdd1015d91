"""A KV connector that keeps blocks in files, which it finds by vLLM's block hashes.

vLLM's own that do so need a GPU. The files are those of its `ExampleConnector`, whose names are
made of tokens, and here of the hash of the last block too.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    align_to_block_size,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request


class DiskConnector(ExampleConnector):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: dict[str, Request] = {}

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._requests[request.request_id] = request
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def _found_match_for_request(self, request: Request) -> bool:
        return self._found_match_for_prompt(list(request.prompt_token_ids), self._keys(request))

    def _keys(self, request: Request) -> list[str]:
        tokens = align_to_block_size(len(request.prompt_token_ids) - 1, self._block_size)
        return [request.block_hashes[tokens // self._block_size - 1].hex()] if tokens else []

    def build_connector_meta(self, output: SchedulerOutput) -> ExampleConnectorMetadata:
        meta = ExampleConnectorMetadata()
        for new in output.scheduled_new_reqs:
            request = self._requests.pop(new.req_id)
            keys, tokens = self._keys(request), list(new.prompt_token_ids)
            is_load = new.req_id in self._requests_need_load
            if is_load or (keys and not self._found_match_for_prompt(tokens, keys)):
                meta.add_request(tokens, new.block_ids[0], self._block_size, not is_load, keys)
        self._requests_need_load.clear()
        return meta
