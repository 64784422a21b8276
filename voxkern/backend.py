"""Which implementation of the ops runs on which kind of device.

`native` (the compiled extension), then `triton`, then `reference` (plain torch): the first that
has an op on a device serves it, resolved once. The environment variable `VOXKERN_BACKEND`, and
`force` after it, have one serve all devices; an op on a device where that one is missing raises.
An op that a forced backend lacks runs its reference: an engine speaks on any backend, and on no
other than the one that was asked for.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

BACKENDS = ("native", "triton", "reference")
OPS: list[str] = []
"""Names of all ops, in the order in which `voxkern.ops` declares them."""

_LIBRARY = Path(os.environ.get("VOXKERN_LIBRARY") or Path(__file__).parent / "_C.so").absolute()
if os.environ.get("VOXKERN_LIBRARY") and not _LIBRARY.exists():
    raise ImportError(f"VOXKERN_LIBRARY={os.environ['VOXKERN_LIBRARY']}: there is no such file")


_forced = os.environ.get("VOXKERN_BACKEND") or None


def force(backend: str | None) -> str | None:
    """Have `backend` serve every op from now on; None lets the first serve that has it.

    Returns:
        What was forced until now.
    """
    global _forced
    before, _forced = _forced, backend
    return before


def forced() -> str | None:
    """The backend that serves every op because it was asked for."""
    return _forced


@functools.cache
def why_missing(backend: str, device_type: str, op: str | None = None) -> str | None:
    """None if `backend` can run op `op`, or any op, on `device_type` ("cpu", "cuda", "meta"), else
    the reason."""
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
        if package is None or package.origin is None:  # a folder with nothing but old bytecode
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


def has_kernel(library: object, op: str, key: str) -> bool:
    """Whether a library of ops, `torch.ops.<name>`, has this one for a dispatch key."""
    return hasattr(library, op) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{library.name}::{op}", key
    )


def backend_for(device_type: str, op: str | None = None) -> str:
    """The backend that serves op `op`, or most of them, on `device_type`.

    Raises:
        RuntimeError: one is forced that is missing there.
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


def on_its_device(function: Callable) -> Callable:
    """`function`, with its first argument's GPU as the current one, where Triton launches."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch.cuda.device_of(next(iter((*args, *kwargs.values())))):
            return function(*args, **kwargs)

    return call


def on_one_device(fake: Callable) -> Callable:
    """`fake`, but refusing a real tensor beside a meta one: torch sends such a call here, and the
    result would be real memory that nobody filled."""
    parameters = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def check(*args, **kwargs):
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        devices = {name: a.device for name, a in named.items() if isinstance(a, torch.Tensor)}
        first = next(iter(devices.values()))
        for name, device in devices.items():
            if device != first:
                raise RuntimeError(f"{name}: on {device}, the op's first tensor on {first}")
        return fake(*args, **kwargs)

    return check


def op(fake: Callable) -> Callable:
    """Declare an op: register the decorated fake kernel, and return the dispatching function."""
    name = fake.__name__
    OPS.append(name)
    if hasattr(torch.ops.voxkern, name):  # an extension that is older may lack it
        torch.library.register_fake(f"voxkern::{name}", on_one_device(fake))

    parameters = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def call(*args, **kwargs):
        first = args[0] if args else kwargs[parameters[0]]
        return implementation(name, backend_for(first.device.type, name))(*args, **kwargs)

    return call


_CUDA_LIBRARY = _LIBRARY.with_name("_C_cuda.so")
_cuda_error = ""
if _LIBRARY.exists():
    torch.ops.load_library(str(_LIBRARY))
    # It needs the libraries of a torch with CUDA, of the version that it was built with; without
    # them there are still the CPU's kernels.
    if torch.version.cuda and _CUDA_LIBRARY.exists():
        try:
            torch.ops.load_library(str(_CUDA_LIBRARY))
        except OSError as error:
            _cuda_error = str(error)
