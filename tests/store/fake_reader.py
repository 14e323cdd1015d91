"""A reader of adapters that exist in their paths only: `/fake/a?blocks=64,128&hang=1`.

blocks: bytes of each block. digest, version: what makes adapters alike; the path otherwise.
sleep, busy: seconds that reading takes. hang: opening never ends. fail: opening fails with that
text. crash: the process ends. exhaust: it uses up its processor time. bus: it touches memory that
its file has no room for.
stubborn: on a thread, the job outlives its end.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import msgspec
import numpy as np

from vllm_multilora.store.memory.syscalls import libc

MIB = 1 << 20


@dataclass(frozen=True)
class FakeIntakeResult:
    digest: str
    nbytes: int
    parts: tuple[str, ...] = ()


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(path: str) -> bytes:
    """The byte that every block of an adapter is full of."""
    options = dict(parse_qsl(path.partition("?")[2]))
    return bytes([int(digest_of(options.get("digest", path))[:2], 16) or 1])


class FakeIntake:
    rank = 8
    has_special = False
    invocation_tokens = ()
    dora = False

    def __init__(self, path: str, options: dict[str, str]) -> None:
        self._path = path
        self._options = options
        self.block_bytes = np.array(options.get("blocks", "64").split(","), np.int64)

    def read(self, addresses, places) -> FakeIntakeResult:
        time.sleep(float(self._options.get("sleep", 0)))
        end = time.process_time() + float(self._options.get("busy", 0))
        while time.process_time() < end:
            pass
        if addresses is not None:
            value = content_of(self._path)[0]
            for address, size in zip(addresses, self.block_bytes, strict=True):
                ctypes.memset(int(address), value, int(size))
        if "crash" in self._options:
            os._exit(3)
        if "bus" in self._options:
            with Path(__file__).open() as file:
                address = libc.mmap(None, MIB, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), 0)
            ctypes.string_at(address + MIB - 1, 1)
        if "exhaust" in self._options:
            _, most = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (1, most))
            while True:
                pass
        digest = digest_of(self._options.get("digest", self._path))
        return FakeIntakeResult(digest, int(self.block_bytes.sum()))


class FakeSource:
    def __init__(self, path: str, options: dict[str, str]) -> None:
        self._path = path
        self._options = options
        self.version = options.get("version", path.replace(" ", "_"))

    def check(self, layouts) -> FakeIntake:
        return FakeIntake(self._path, self._options)


class FakeReader:
    def decode_layouts(self, data: bytes) -> list:
        return msgspec.msgpack.decode(data, type=list)

    def prepare(self, settings) -> None:
        pass

    def rules(self, settings) -> None:
        return None

    @contextlib.contextmanager
    def open(self, path: str, rules) -> Iterator[FakeSource]:
        options = dict(parse_qsl(path.partition("?")[2]))
        if "hang" in options:
            time.sleep(float(options["hang"]))
        if "fail" in options:
            raise ValueError(options["fail"])
        yield FakeSource(path, options)
