"""Kernels in Triton's interpreter, watched: every launch, program, load and store.

The interpreter runs a kernel program by program in Python and reads and writes the tensors' own
memory. All of that passes through one builder object, whose methods are wrapped here for as long
as somebody watches. Written against Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter

from multilora_kernels import triton as backend
from multilora_kernels.triton.launch import DeviceFacts

_STACK_SLOTS = 40_000
"""Slots in a frame that fills most of a 512 KiB chunk: the rest is for a kernel's frames."""


class Observer(Protocol):
    """Gets to know what interpreted kernels do."""

    def begin_launch(self, kernel: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
        """A kernel, of whatever package, is launched with these tensors among its arguments."""

    def begin_program(self) -> None:
        """The next program of the launch starts."""

    def access(self, addresses: npt.NDArray[np.uint64], item_size: int, store: bool) -> None:
        """The program loads or stores elements of `item_size` bytes at these addresses.

        Lanes that are masked out are not among them, and an address that several lanes of the
        same instruction ask for is there once, since hardware serves them together. An atomic
        operation is a load and a store.
        """

    def end_launch(self) -> None:
        """The launch is over."""


@contextmanager
def launched_as_on(facts: DeviceFacts) -> Iterator[None]:
    """Meanwhile these kernels get the blocks and grids that they would get on that device."""
    if facts.pdl:
        raise ValueError("the interpreter has no programmatic dependent launch: pdl must be off")
    original = vars(backend)["device_facts"]
    vars(backend)["device_facts"] = lambda device: facts
    try:
        yield
    finally:
        vars(backend)["device_facts"] = original


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tells the observer about every kernel that is launched meanwhile.

    The observer is told before something happens, so that what it raises prevents it.
    Launches are also about four times as fast as otherwise. Overflow checks, which compiled
    kernels do not make either, are off; a kernel's calls to other Triton functions do not patch
    Triton's language anew; and what follows from a type is worked out once.
    """
    builder, patch_language = interpreter.interpreter_builder, interpreter._patch_lang
    run, options = interpreter.InterpretedFunction.run, builder.options
    run_with_room = _with_room(run)
    patched: dict[int, Any] = {}  # by module: its functions see the same language

    def patch_language_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch_language(function)
        return patched[module]

    def observed_run(kernel: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        tensors = list(_tensors((*arguments, *named.values())))
        observer.begin_launch(kernel.fn, tensors)
        try:
            return run_with_room(kernel, *arguments, **named)
        finally:
            observer.end_launch()

    wrapped = {
        "set_grid_idx": _before(builder.set_grid_idx, lambda *_: observer.begin_program()),
        "create_masked_load": _before(
            builder.create_masked_load,
            lambda pointers, mask, *_: _report(observer, pointers, mask, False),
        ),
        "create_masked_store": _before(
            builder.create_masked_store,
            lambda pointers, value, mask, *_: _report(observer, pointers, mask, True),
        ),
        "create_atomic_rmw": _before(
            builder.create_atomic_rmw,
            lambda op, pointers, value, mask, *_: _report(observer, pointers, mask, False, True),
        ),
        "create_atomic_cas": _before(
            builder.create_atomic_cas,
            lambda pointers, *_: _report(observer, pointers, None, False, True),
        ),
    }
    numpy_type, make_tensor, make_block_type = (
        interpreter._get_np_dtype,
        tl.tensor.__init__,
        tl.block_type.__init__,
    )
    try:
        interpreter._get_np_dtype = _once_per_type(numpy_type)
        tl.tensor.__init__ = _with_known_shapes(make_tensor)
        tl.block_type.__init__ = _with_known_attributes(make_block_type)
        interpreter.InterpretedFunction.run = observed_run
        interpreter._patch_lang = patch_language_once
        builder.options = replace(options, sanitize_overflow=False)
        vars(builder).update(wrapped)
        yield
    finally:
        for name in wrapped:
            vars(builder).pop(name, None)
        builder.options = options
        interpreter._patch_lang = patch_language
        interpreter.InterpretedFunction.run = run
        tl.block_type.__init__ = make_block_type
        tl.tensor.__init__ = make_tensor
        interpreter._get_np_dtype = numpy_type


def _with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with Python's stack in one piece, whatever lies below it.

    Python gets its stack from the system in pieces of 16 KiB, and gives back at once what it does
    not use. Where a piece ends amid a kernel, it would do so in every call of some depth.
    """

    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    call.__code__ = call.__code__.replace(co_stacksize=_STACK_SLOTS)
    return call


def _once_per_type(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def known(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = numpy_type(dtype)
        return found[dtype.name]

    return known


def _with_known_shapes(make: Callable[..., None]) -> Callable[..., None]:
    """Makes tensors of a type that there was before with the shape that it had then."""
    found: dict[str, dict[str, Any]] = {}
    own = ("handle", "type", "dtype")

    def made(self: Any, handle: Any, type: Any) -> None:
        if type.name not in found:
            make(self, handle, type)
            found[type.name] = {k: v for k, v in vars(self).items() if k not in own}
            return
        vars(self).update(found[type.name], handle=handle, type=type, dtype=type.scalar)

    return made


def _with_known_attributes(make: Callable[..., None]) -> Callable[..., None]:
    """Makes block types like those that there were before of an element type and a shape."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def made(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if key not in found:
            make(self, element_ty, shape)
            found[key] = dict(vars(self))
            return
        vars(self).update(found[key])

    return made


def _before(method: Callable[..., Any], tell: Callable[..., None]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **named: Any) -> Any:
        tell(*arguments, *named.values())
        return method(*arguments, **named)

    return wrapper


def _report(observer: Observer, pointers: Any, mask: Any, *stores: bool) -> None:
    addresses = pointers.data
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
    addresses = np.unique(addresses)
    item_size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    for store in stores:
        observer.access(addresses, item_size, store)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from _tensors(tuple(argument))
