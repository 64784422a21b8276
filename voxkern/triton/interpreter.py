"""Triton's interpreter, made quick enough for tests and fit for NumPy 2.4."""

from collections.abc import Callable
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    """Let the interpreter replace the language's functions once, not in every call of a helper.

    That takes a millisecond, most of the time of a small kernel. What it replaces stays replaced:
    a process that interprets compiles nothing. And NumPy 2.4 no longer takes the arrays of one
    element for integers that Triton 3.6 gives it as bounds of loops.
    """
    patch: Callable = interpreter._patch_lang
    patched = set()

    def once(fn: Callable) -> SimpleNamespace:
        languages = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not languages <= patched:
            patch(fn)
            patched.update(languages)
            tl.tensor.__index__ = lambda self: self.handle.data.item()
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
