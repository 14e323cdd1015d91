"""How jobs read adapters; the only place where the store knows what an adapter is."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import msgspec

from multilora_kernels.packs import packing
from vllm_multilora.adapters import intake
from vllm_multilora.adapters.adapter_errors import AdapterReadError
from vllm_multilora.adapters.blend import Blend
from vllm_multilora.adapters.blend_intake import BlendSource, open_blend
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.signing.signers import Signers, load_cryptography
from vllm_multilora.errors import ConfigError
from vllm_multilora.store.protocol.messages import StoreSettings


class AdapterReader:
    """Reads adapters as `adapters.intake` does.

    The native code is loaded, and compiled if it must be, when this is made: jobs may not.
    """

    def __init__(self) -> None:
        packing.prepare()

    def decode_layouts(self, data: bytes) -> list[ModelLayout]:
        """The layouts of `Configure`; raises `msgspec.MsgspecError`."""
        layouts = msgspec.msgpack.decode(data, type=list[ModelLayout])
        for layout in layouts:
            layout.by_tensor  # noqa: B018 (jobs inherit it, and work it out no more)
        return layouts

    def prepare(self, settings: StoreSettings) -> None:
        """Loads what jobs with these settings will need, once for all of them."""
        if settings.signing_keys is not None:
            with contextlib.suppress(ConfigError):  # jobs say so
                load_cryptography()

    def rules(self, settings: StoreSettings) -> intake.Rules:
        """What adapters are opened by; reads the operator's files; raises `AdapterReadError`."""
        signers = None
        if settings.signing_keys is not None:
            try:
                signers = Signers.read(settings.signing_keys)
            except ConfigError as error:
                # Whose adapter it is need not know where the file is.
                print(f"multilora store: signing keys: {error}", file=sys.stderr, flush=True)
                raise AdapterReadError(
                    "its signature cannot be checked, since the server's file of signing keys "
                    "cannot be used; the log of its store says why"
                ) from None  # if that file is missing, the adapter's are not
        return intake.Rules(
            settings.allowed_roots,
            settings.allow_pickle,
            settings.check_finite,
            settings.directories,
            signers,
        )

    def open(
        self, path: str, rules: intake.Rules
    ) -> AbstractContextManager[intake.AdapterSource | BlendSource]:
        """Opens an adapter's files; raises `AdapterError`."""
        blend = Blend.read(path)
        return intake.open_adapter(path, rules) if blend is None else open_blend(blend, rules)
