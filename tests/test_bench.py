"""The benchmarks' arithmetic; nothing is timed."""

from collections import Counter

import pytest
import torch
from csm_1b import CSM_1B, FrameBytes, frame_bytes
from llama_frames import BITS, HEAD_ROWS, gguf_shapes, llama_frame_bytes
from peers import GROUPS, Peer, Rounds, order, ratio
from roofline import working_sets

from vox_serve.csm_weights import CsmWeights
from vox_serve.model_config import CsmConfig

CONFIG = CsmConfig.from_json(CSM_1B)
DEPTH_STEPS = CONFIG.num_codebooks - 1


def test_a_frame_reads_what_the_facts_say():
    read = frame_bytes(CsmWeights.empty(CONFIG, torch.bfloat16, "meta"))
    backbone, depth, head, projection = 973e6, 111e6, 2048 * 2051, 2048 * 1024
    heads = DEPTH_STEPS * 1024 * 2051
    assert read.once / 2 == pytest.approx(backbone + head + projection + heads, rel=1e-3)
    assert read.step / 2 == pytest.approx(depth, rel=3e-3)
    assert read.steps == DEPTH_STEPS
    assert read.total == read.once + DEPTH_STEPS * read.step


def test_a_cache_saves_all_but_the_first_of_the_steps():
    read = FrameBytes(once=1000, step=100, steps=31)
    assert read.from_memory(0) == read.total == 4100
    assert read.from_memory(40) == 1000 + 100 + 30 * 60
    assert read.from_memory(100) == read.from_memory(500) == 1100


def test_llama_cpp_reads_our_weights_without_the_projection():
    """Its frame: the same matrices, heads of whole blocks of rows, norms in float32."""
    weights = CsmWeights.empty(CONFIG, torch.bfloat16, "meta")
    ours, theirs = frame_bytes(weights), llama_frame_bytes(CONFIG, "BF16")
    extra_rows = 2 * (HEAD_ROWS - CONFIG.audio_vocab_size)
    extra_norms = {
        name: 2 * sum(t.numel() for t in (part.attn_norm, part.mlp_norm, part.norm))
        for name, part in (("backbone", weights.backbone), ("depth", weights.depth))
    }
    heads = 2 * weights.code_heads.numel()
    projection = 2 * weights.projection.numel()
    left_out = heads + projection
    assert theirs.once == ours.once - left_out + extra_rows * 2048 + extra_norms["backbone"]
    assert theirs.steps == ours.steps
    head = heads // DEPTH_STEPS + extra_rows * 1024
    assert theirs.step == ours.step + head + extra_norms["depth"]


@pytest.mark.parametrize("gguf_format", BITS)
def test_rows_are_whole_blocks_of_every_gguf_format(gguf_format):
    for part in (CONFIG.backbone, CONFIG.depth):
        shapes = dict(gguf_shapes(part))
        assert all(shape[-1] % 32 == 0 for shape in shapes.values())
        assert shapes["output.weight"][0] % 16 == 0
    exact = llama_frame_bytes(CONFIG, "BF16").total * BITS[gguf_format] / 16
    # All but the norms' scales.
    assert llama_frame_bytes(CONFIG, gguf_format).total == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_rounds_give_every_peer_every_place_twice(n):
    peers = [f"peer {i}" for i in range(n)]
    places = Counter()
    for index in range(2 * n):
        assert sorted(order(peers, index)) == peers
        places.update(enumerate(order(peers, index)))
    assert set(places.values()) == {2}
    assert len(places) == n * n


def test_peers_of_a_group_fit_in_memory_together():
    for group in GROUPS:
        assert len(set(group)) == len(group)
        assert sum(peer.memory_bytes for peer in group) < 22e9
        # A ratio needs ours beside it.
        assert all(Peer("voxkern", peer.precision) in group for peer in group)


def test_ratios_and_shares_are_taken_within_a_round():
    """A machine that is half as fast in one round changes neither."""
    read = FrameBytes(once=10**9, step=0, steps=31)
    ours = Rounds(read, "", ms=[100.0, 200.0, 100.0], bandwidth=[20e9, 10e9, 20e9])
    theirs = Rounds(read, "", ms=[300.0, 600.0, 250.0], bandwidth=ours.bandwidth)
    assert ratio(theirs, ours) == (3.0, 2.5, 3.0)
    assert ratio(None, ours) is None
    assert ours.percent_of_roofline(read.total) == pytest.approx(50.0)


def test_working_sets_leave_out_caches_that_are_not_known():
    names = [name for name, _ in working_sets(0, 32 << 20, threads=2)]
    assert names == ["half of L3", "L3", "twice L3", "memory"]
    assert dict(working_sets(1 << 20, 0, threads=4))["half of L2 each"] == 2 << 20
