"""Chooses the backend that runs each op on each kind of device.

Backends in order of preference: `native` (the compiled extension), `triton`, `reference` (plain
torch). The first one that has the op on the device serves it; the choice is made once. The
environment variable `VOXKERN_BACKEND`, or `force` later, makes one backend serve all devices; on a
device where that backend is missing, every op raises. If a forced backend lacks an op, the
reference runs it, so that an engine works on any backend and never silently uses a third one.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("native", "triton", "reference")
OPS: list[str] = []
"""Names of all public ops, in the order of their declarations in `voxkern.ops`."""

_LIBRARY = Path(os.environ.get("VOXKERN_LIBRARY") or Path(__file__).parent / "_C.so").absolute()
if os.environ.get("VOXKERN_LIBRARY") and not _LIBRARY.exists():
    raise ImportError(f"VOXKERN_LIBRARY={os.environ['VOXKERN_LIBRARY']}: there is no such file")


_forced = os.environ.get("VOXKERN_BACKEND") or None


def force(backend: str | None) -> str | None:
    """Make `backend` serve every op from now on; None restores the order of preference.

    Returns:
        The backend that was forced until now, or None.
    """
    global _forced
    previous, _forced = _forced, backend
    return previous


def forced() -> str | None:
    """The backend that is forced to serve every op, or None."""
    return _forced


@functools.cache
def why_missing(backend: str, device_type: str, op: str | None = None) -> str | None:
    """The reason why `backend` cannot run op `op` (any op, if None) on `device_type` ("cpu", "cuda"
    or "meta"); None if it can."""
    if backend == "native":
        if not _LIBRARY.exists():
            return "the extension is not built (pip install -e .)"
        key = "Meta" if device_type == "meta" else device_type.upper()
        if not any(has_kernel(torch.ops.voxkern, name, key) for name in OPS):
            if device_type == "cuda" and _cuda_error:
                return f"{_CUDA_LIBRARY.name} does not load: {_cuda_error}"
            return f"the extension was built without {key} kernels"
        if op and not has_kernel(torch.ops.voxkern, op, key):
            return f"the extension has no {key} kernel of {op}"
    elif backend == "triton":
        package = importlib.util.find_spec("voxkern.triton")
        if package is None or package.origin is None:  # a folder that holds only stale bytecode
            return "this version has no Triton kernels"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if op and importlib.util.find_spec(f"voxkern.triton.{op}") is None:
            return f"there is no Triton kernel of {op}"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type == "cpu" and not interpreted:
            return "Triton runs CPU tensors only under TRITON_INTERPRET=1"
        if device_type == "cuda" and interpreted:
            return "TRITON_INTERPRET=1 is for CPU tensors"
        if device_type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
            major, minor = torch.cuda.get_device_capability()
            if major < 8:
                return f"Triton needs a GPU of capability 8.0, this one has {major}.{minor}"
            if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
                return "Triton needs a C compiler: gcc, clang, or what CC names"
    elif backend != "reference":
        return f"there is no such backend: choose one of {', '.join(BACKENDS)}"
    return None


def has_kernel(library: Any, op: str, key: str) -> bool:
    """True if a library `torch.ops.<name>` has a kernel of `op` for this dispatch key."""
    return hasattr(library, op) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{library.name}::{op}", key
    )


def backend_for(device_type: str, op: str | None = None) -> str:
    """The backend that serves op `op` (if None: the preferred one for any op) on `device_type`.

    Raises:
        RuntimeError: the forced backend is missing on that device.
    """
    return _resolved(device_type, op, _forced)


@functools.cache
def _resolved(device_type: str, op: str | None, forced: str | None) -> str:
    if forced:
        if reason := why_missing(forced, device_type):
            raise RuntimeError(f"backend {forced}: {reason}")
        return "reference" if why_missing(forced, device_type, op) else forced
    return next(name for name in BACKENDS if why_missing(name, device_type, op) is None)


@functools.cache
def implementation(name: str, backend: str) -> Callable:
    """The function that runs op `name` on `backend`."""
    if backend == "native":
        return getattr(torch.ops.voxkern, name).default
    function = getattr(importlib.import_module(f"voxkern.{backend}.{name}"), name)
    return on_its_device(function) if backend == "triton" else function


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap `function` to make the GPU of its first argument current: Triton launches there."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(iter((*args, *kwargs.values())))):
            return function(*args, **kwargs)

    return call


def on_one_device(fake: Callable[P, R]) -> Callable[P, R]:
    """Wrap `fake` to refuse a mix of real and meta tensors: torch dispatches such a call to the
    fake kernel, which would return real but uninitialised memory."""
    parameters = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def check(*args: P.args, **kwargs: P.kwargs) -> R:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        devices = {name: a.device for name, a in named.items() if isinstance(a, torch.Tensor)}
        first = next(iter(devices.values()))
        for name, device in devices.items():
            if device != first:
                raise RuntimeError(f"{name}: on {device}, the op's first tensor on {first}")
        return fake(*args, **kwargs)

    return check


def op(fake: Callable[P, R]) -> Callable[P, R]:
    """Declare an op: register the decorated fake kernel and return the dispatching function."""
    name = fake.__name__
    OPS.append(name)
    if hasattr(torch.ops.voxkern, name):  # an older extension may lack it
        torch.library.register_fake(f"voxkern::{name}", on_one_device(fake))

    parameters = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs[parameters[0]]
        return implementation(name, backend_for(first.device.type, name))(*args, **kwargs)

    return call


_CUDA_LIBRARY = _LIBRARY.with_name("_C_cuda.so")
_cuda_error = ""
if _LIBRARY.exists():
    torch.ops.load_library(str(_LIBRARY))
    # The CUDA library needs the libraries of a CUDA torch, of the version that it was built with;
    # if they are missing, the CPU kernels still work.
    if torch.version.cuda and _CUDA_LIBRARY.exists():
        try:
            torch.ops.load_library(str(_CUDA_LIBRARY))
        except OSError as error:
            _cuda_error = str(error)
