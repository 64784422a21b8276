import torch
from torch import Tensor


def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    num_pages, _, page_size, _ = k_pages.shape
    if q.device.type == "cpu":
        if bool(((positions < 0) | (positions >= rope_table.shape[0])).any()):
            raise RuntimeError("positions: an entry lies outside rope_table")
        if bool((slots >= num_pages * page_size).any()):
            raise RuntimeError("slots: an entry lies outside the pages")
    cos, sin = (half.repeat(1, 2)[:, None] for half in rope_table[positions].chunk(2, -1))

    def rotate(x: Tensor) -> Tensor:
        low, high = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)

    written = slots >= 0
    page = slots[written] // page_size
    offset = slots[written] % page_size
    k_pages[page, :, offset] = rotate(k)[written]
    v_pages[page, :, offset] = v[written]
    q.copy_(rotate(q))
