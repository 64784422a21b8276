import torch
from torch import Tensor


def embed_frames(frames: Tensor, mask: Tensor, audio_table: Tensor, text_table: Tensor) -> Tensor:
    num_codebooks = frames.shape[1] - 1
    vocab_size = audio_table.shape[0] // num_codebooks
    total = torch.zeros(
        frames.shape[0], audio_table.shape[1], dtype=torch.float32, device=frames.device
    )
    for column in range(num_codebooks + 1):
        set_rows = mask[:, column]
        if column < num_codebooks:
            first = column * vocab_size
            table = audio_table[first : first + vocab_size]
        else:
            table = text_table
        ids = frames[:, column].masked_fill(~set_rows, 0)
        if frames.device.type == "cpu" and bool(((ids < 0) | (ids >= len(table))).any()):
            raise RuntimeError(f"frames: an id in column {column} lies outside its table")
        total += table[ids].float().masked_fill(~set_rows[:, None], 0.0)
    return total.to(audio_table.dtype)
