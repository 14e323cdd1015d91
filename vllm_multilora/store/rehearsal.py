"""Does a job's work in the store itself, so that jobs inherit code that Python has adapted to it.

A process is forked for each job. Python specializes code while it runs, and fills caches. A job
that has to do so itself copies the pages that it changes, and takes more processor time.
"""

from __future__ import annotations

import contextlib
import json
import socket
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from multilora_kernels.dtypes import BFLOAT16
from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.jobs.jobs import run_job
from vllm_multilora.store.memory.arena import PAGE
from vllm_multilora.store.memory.entries import Binding, Load, Scope
from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol import job_messages as msg
from vllm_multilora.store.protocol.channel import Channel
from vllm_multilora.store.protocol.messages import StoreSettings

JOBS = 16
"""Python specializes a function after eight calls."""

_SCOPE = Scope("", (), (), allow_pickle=False, check_finite=True, signing_keys=None)


def rehearse(reader: AdapterReader) -> bool:
    """Runs jobs for a small adapter of the store's own; whether all have ended well.

    Where no adapter or no memory can be had they have not, and the store's jobs take longer.
    """
    with contextlib.suppress(OSError), TemporaryDirectory(prefix="multilora-") as folder:
        layout = write_sample(Path(folder))
        load = Load(0, Binding("", _SCOPE, 0), folder, [], [layout], StoreSettings())
        checked = _run(load, reader, msg.CheckOnly(), [])
        if checked is None:
            return False
        sizes = np.frombuffer(checked.block_bytes, np.int64)
        places = np.cumsum(sizes) - sizes
        extent = -(-int(sizes.sum()) // PAGE) * PAGE
        place = msg.Place(places.tobytes(), [(0, 0, extent)])
        segments = SharedSegments()
        try:
            segments.create(0, extent)
            descriptors = [segments.descriptor(0)]
            return all(_run(load, reader, place, descriptors) for _ in range(JOBS))
        finally:
            segments.close_all()
    return False


def _run(
    load: Load, reader: AdapterReader, answer: msg.ToJob, descriptors: list[int]
) -> msg.Checked | None:
    """Runs a job, which finds the answer to its question there already; returns the question."""
    ours, theirs = socket.socketpair()
    with closing(Channel[msg.FromJob](ours, msg.FromJob)) as channel:
        channel.send(answer, descriptors)
        run_job(theirs, load, reader)
        said = [message for message, _ in channel.receive()]
    if not said or not isinstance(said[-1], msg.Done):
        return None
    return next(message for message in said if isinstance(message, msg.Checked))


_LAYERS, _HIDDEN, _KEYS, _RANK = 4, 64, 32, 4
_OUTPUTS = {"q_proj": _HIDDEN, "k_proj": _KEYS, "v_proj": _KEYS, "o_proj": _HIDDEN}


def write_sample(folder: Path) -> ModelLayout:
    """Writes the adapter's two files, with weights of 0, and returns the model's layout."""
    slices: list[SliceLayout] = []
    header: dict[str, object] = {}
    end = 0
    for layer in range(_LAYERS):
        for projection, outputs in _OUTPUTS.items():
            name = f"model.layers.{layer}.self_attn.{projection}"
            slices.append(
                SliceLayout(name, len(slices), _HIDDEN, outputs, (0, _HIDDEN), (0, outputs))
            )
            for part, shape in (("A", (_RANK, _HIDDEN)), ("B", (outputs, _RANK))):
                begin, end = end, end + shape[0] * shape[1] * BFLOAT16.itemsize
                header[f"base_model.model.{name}.lora_{part}.weight"] = {
                    "dtype": "BF16",
                    "shape": shape,
                    "data_offsets": (begin, end),
                }
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": [*_OUTPUTS],
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    text = json.dumps(header).encode()
    (folder / TENSORS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return ModelLayout(tuple(slices), _RANK, BFLOAT16, columns_first=True)
