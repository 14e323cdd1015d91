"""Names of served adapters and the paths of their folders, as untrusted clients write them."""

from __future__ import annotations

from vllm_multilora.adapters.blend import is_blend

MAX_NAME_BYTES = 255
"""Bytes of a name in UTF-8: the limit for a folder's name in all common file systems."""

MAX_PATH_BYTES = 4095
"""Bytes of an adapter's path: Linux opens no longer ones."""


def name_fault(name: str) -> str | None:
    """What keeps an adapter from having a name; None if it may have it.

    Any script will do, emoji included. Names get into logs, metrics, headers and paths, so they
    are short and printable, and lead nowhere.
    """
    # Characters first: whoever sends megabytes is not to have them encoded.
    if len(name) > MAX_NAME_BYTES or len(_encoded(name)) > MAX_NAME_BYTES:
        return f"has more than {MAX_NAME_BYTES} bytes"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if any(part in (".", "..") for part in name.split("/")):
        return "has a part that is . or .."
    return None


def path_fault(path: str) -> str | None:
    """What keeps a text from being the path of a folder; None if it may be one."""
    if len(path) > MAX_PATH_BYTES or len(_encoded(path)) > MAX_PATH_BYTES:
        return f"has more than {MAX_PATH_BYTES} bytes"
    if "\0" in path:
        return "has a null character"
    if is_blend(path):
        return "is the text of a blend: blends are named in requests and in the routes file"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "has characters that cannot be encoded"
    return None


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
