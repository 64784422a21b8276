"""Argument checks with the same messages as the native ops (csrc/common/check.h).

They read shapes, dtypes and devices, never values, so they do not wait for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(t: Tensor, name: str) -> None:
    known = t.dtype in (torch.float32, torch.bfloat16)
    check(known, f"{name}: expected float32 or bfloat16, got {dtype_name(t.dtype)}")


def check_dim(t: Tensor, name: str, dim: int) -> None:
    check(t.dim() == dim, f"{name}: expected {dim} dimensions, got shape {list(t.shape)}")


def check_shape(t: Tensor, name: str, letters: str, sizes: Sequence[int | None]) -> None:
    """`letters` spells the expected shape for the reader; a size of None matches any."""
    matches = t.dim() == len(sizes) and all(
        size in (None, mine) for size, mine in zip(sizes, t.shape, strict=True)
    )
    if not matches:
        spelt = ", ".join("any" if size is None else str(size) for size in sizes)
        raise RuntimeError(f"{name}: expected shape {letters} = [{spelt}], got {list(t.shape)}")


def check_operand(
    t: Tensor,
    name: str,
    like: Tensor,
    dtype: torch.dtype,
    letters: str | None = None,
    sizes: Sequence[int | None] = (),
) -> None:
    """Contiguous, on the device of `like`, of this dtype and, if `letters` is given, this shape."""
    check(t.device == like.device, f"{name}: on {t.device}, the op's first tensor on {like.device}")
    check(t.dtype == dtype, f"{name}: expected {dtype_name(dtype)}, got {dtype_name(t.dtype)}")
    check(t.is_contiguous(), f"{name}: expected a contiguous tensor")
    if letters is not None:
        check_shape(t, name, letters, sizes)


def check_heads(
    t: Tensor, name: str, like: Tensor, letters: str = "", sizes: Sequence[int] = ()
) -> None:
    """`[T, H, D]`: the heads of a token are contiguous, the stride between tokens is free."""
    check(t.device == like.device, f"{name}: on {t.device}, the op's first tensor on {like.device}")
    check(
        t.dtype == like.dtype,
        f"{name}: expected {dtype_name(like.dtype)}, got {dtype_name(t.dtype)}",
    )
    check_dim(t, name, 3)
    contiguous = t.numel() == 0 or t[0].is_contiguous()
    check(contiguous, f"{name}: expected the last two dimensions to be contiguous")
    if letters:
        check_shape(t, name, letters, sizes)


def check_pages(k_pages: Tensor, v_pages: Tensor, q: Tensor) -> None:
    """Pages `[P, Hkv, S, D]` with the head width and dtype of q."""
    sizes = (None, None, None, q.shape[2])
    check_operand(k_pages, "k_pages", q, q.dtype, "[P, Hkv, S, D]", sizes)
    not_empty = k_pages.shape[1] >= 1 and k_pages.shape[2] >= 1
    check(not_empty, f"k_pages: expected [P, Hkv, S, D], got {list(k_pages.shape)}")
    check_operand(v_pages, "v_pages", q, q.dtype)
    check(
        v_pages.shape == k_pages.shape,
        f"v_pages: expected k_pages' shape {list(k_pages.shape)}, got {list(v_pages.shape)}",
    )


def check_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> None:
    """The arguments that both attention ops take; Hq is a multiple of Hkv."""
    check_float(q, "q")
    check_heads(q, "q", q)
    check_pages(k_pages, v_pages, q)
    _, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    check(
        heads >= 1 and heads % kv_heads == 0,
        f"q: expected a multiple of k_pages' {kv_heads} heads, got shape {list(q.shape)}",
    )
    check(head_dim >= 1, f"q: expected a head width, got shape {list(q.shape)}")
    check_operand(page_table, "page_table", q, torch.int32)
    check_dim(page_table, "page_table", 2)
