"""Adapters named by a repository of the Hugging Face hub instead of a folder."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from vllm_multilora.adapters.adapter_errors import AdapterNotFoundError
from vllm_multilora.adapters.blend import Blend
from vllm_multilora.adapters.files.missing_files import EXPECTED, is_url, no_folder
from vllm_multilora.adapters.problems import Code, Problem, shown_name

# Nothing that leads elsewhere: whether such a path exists is told to those who may look there.
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def located(path: str) -> str:
    """An absolute path where there is or must be one; a URL or a repository stays as it is.

    Of a blend, the same is done with the paths of its parts; raises `BlendError` if it is none.
    """
    if (blend := Blend.read(path)) is not None:
        return blend.at(located).source
    if is_url(path):
        return path
    given = Path(path)
    try:
        given = given.expanduser()
        is_here = _REPOSITORY.fullmatch(path) is None or given.exists()
    except (OSError, ValueError, RuntimeError):
        # Too long, with a null character, or below nobody's home: said when it is opened.
        is_here = True
    return str(given.absolute()) if is_here else path


def fetched(path: str, *, is_allowed: bool) -> str:
    """The folder of an adapter, downloaded if that is allowed; raises `AdapterNotFoundError`."""
    if (blend := Blend.read(path)) is not None:
        return blend.at(partial(fetched, is_allowed=is_allowed)).source
    if Path(path).is_absolute():
        return path
    if is_url(path):
        raise AdapterNotFoundError.of(no_folder(path))
    name = shown_name(path)
    if not is_allowed:
        hint = (
            "give its absolute path; where it is a repository of the Hugging Face hub, start the "
            "server with --multilora-allow-hub"
        )
        raise AdapterNotFoundError.of(replace(no_folder(path), hint=hint))
    # Late: nothing else in the store needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(repo_id=path))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = shown_name(str(error).partition("\n")[0])
        message = f"{name} is not a folder here, and the Hugging Face hub does not have it: {said}"
        problem = Problem(Code.FOLDER_MISSING, name, "", said, EXPECTED, message)
        raise AdapterNotFoundError.of(problem) from error
