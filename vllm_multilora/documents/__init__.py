"""Settings files that may change while they are in use: YAML or JSON, with precise errors."""

from vllm_multilora.documents.document import (
    Document,
    DocumentError,
    Keys,
    read_document,
    read_json,
)
from vllm_multilora.documents.watched import WatchedFile, read_file

__all__ = [
    "Document",
    "DocumentError",
    "Keys",
    "WatchedFile",
    "read_document",
    "read_file",
    "read_json",
]
