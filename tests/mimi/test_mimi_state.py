"""Codec streams in rows of one state, compared with each stream alone."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimi_oracles import assert_same_audio, random_codes, save_hf_mimi
from vox_serve.mimi import Mimi, load_mimi
from vox_serve.mimi.state import StreamState

SHAPES = {
    "short_window": {},
    "real_window": {"sliding_window": 250},
    "replicate": {"pad_mode": "replicate", "upsample_groups": 1, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_hf_mimi(folder, **SHAPES[request.param])
    return folder


@pytest.fixture(scope="module")
def mimi(folder):
    return load_mimi(folder)


def on(device: str, folder, mimi: Mimi) -> Mimi:
    """The codec on another device."""
    tensors = load_file(folder / "model.safetensors")
    return Mimi(mimi.config, {name: tensor.to(device) for name, tensor in tensors.items()})


def frames_of(mimi: Mimi, codes: Tensor) -> Tensor:
    """Audio of a whole decode, `[B, N, frame_samples]`."""
    return mimi.decode(codes).unflatten(1, (codes.shape[1], -1))


def test_interleaved_streams_are_bit_identical(mimi):
    codes = random_codes(2, 40)
    whole = frames_of(mimi, codes)
    states = [mimi.init_state(), mimi.init_state()]
    for t in range(40):
        for i in (0, 1):
            audio = mimi.decode_step(codes[i : i + 1, t : t + 1], states[i])
            assert torch.equal(audio[0], whole[i, t])


def copy_row(state: StreamState, source: int, target: int) -> None:
    for tensor in state.tensors:
        tensor[target] = tensor[source]


def test_rows_at_different_positions(mimi):
    codes, starts = random_codes(3, 150), (0, 140, 37)
    whole = frames_of(mimi, codes)
    state = mimi.init_state(3)
    for i in (1, 2, 0):
        state.reset(0)
        mimi.decode_step(codes[i : i + 1, : starts[i]], state.view(1))
        copy_row(state, 0, i)
    for frames in (1, 4, 5):
        now = [slice(start, start + frames) for start in starts]
        audio = mimi.decode_step(torch.stack([codes[i, now[i]] for i in range(3)]), state)
        for i in range(3):
            assert torch.equal(audio[i], whole[i, now[i]].flatten())
        starts = [part.stop for part in now]
    assert state.positions.tolist() == [mimi.config.latent_stride * start for start in starts]


def test_rows_come_and_go(mimi):
    """As in an engine, the streams that step are the first rows; others move into freed rows."""
    codes = random_codes(3, 30)
    whole = frames_of(mimi, codes)
    state, done = mimi.init_state(3), [0, 0, 0]

    def advance(rows: list[int], frames: int) -> None:
        for _ in range(frames):
            now = torch.stack([codes[i, done[i]] for i in rows])
            audio = mimi.decode_step(now[:, None], state.view(len(rows)))
            for samples, i in zip(audio, rows, strict=True):
                assert torch.equal(samples, whole[i, done[i]])
                done[i] += 1

    advance([0], 9)
    advance([0, 1], 2)
    advance([0, 1, 2], 6)
    copy_row(state, 2, 0)
    advance([2, 1], 8)
    state.reset(2)
    done[0] = 0
    advance([2, 1, 0], 10)


def test_a_new_stream_ignores_its_rows_old_contents(mimi):
    codes = random_codes(2, 20)
    state = mimi.init_state(2)
    for part in (state.keys, state.values, *state.lefts):
        part.fill_(torch.nan)
    state.positions.fill_(99)
    for row in range(2):
        state.reset(row)
    assert torch.equal(mimi.decode_step(codes, state), mimi.decode(codes))


def test_a_step_reads_no_value_on_the_host(folder, mimi, monkeypatch):
    """So a CUDA graph can capture it. The meta device has no values to read."""
    monkeypatch.setattr("voxkern.backend.backend_for", lambda *_: "reference")
    nowhere = on("meta", folder, mimi)
    codes = torch.empty(2, 4, 8, dtype=torch.int64, device="meta")
    audio = nowhere.decode_step(codes, nowhere.init_state(3).view(2))
    assert audio.is_meta
    assert audio.shape == (2, 4 * mimi.config.frame_samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_captures_a_step(folder, mimi):
    there = on("cuda", folder, mimi)
    codes, state = random_codes(2, 30).cuda(), there.init_state(3)
    now, streams = codes[:, :1].clone(), state.view(2)
    there.decode_step(now, streams)  # warms up the ops before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        audio = there.decode_step(now, streams)
    for row in range(2):
        state.reset(row)
    parts = []
    for t in range(30):
        now.copy_(codes[:, t : t + 1])
        graph.replay()
        parts.append(audio.cpu())
    assert_same_audio(torch.cat(parts, 1), mimi.decode(codes.cpu()))
