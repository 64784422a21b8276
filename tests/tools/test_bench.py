"""The benchmarks' arithmetic; nothing is timed."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import machine
import peers
import pytest
import torch
from bench_quantization import Speech, divergence, packed, random_speech, teacher_forced
from csm_1b_shapes import CSM_1B, config_for, weight_bytes
from llama_frames import BITS, HEAD_ROWS, gguf_shapes, llama_frame_bytes
from peers import GROUPS, Peer, Rounds, order, ratio
from roofline import working_sets

from vox_serve.csm_weights import PACKINGS, CsmWeights
from vox_serve.engine import Prompt
from vox_serve.frame_bytes import FrameBytes, frame_bytes
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.sampling import SamplingParams, SamplingRows

CONFIG = CsmConfig.from_json(CSM_1B)
DEPTH_STEPS = CONFIG.num_codebooks - 1


def test_bytes_of_a_frame_match_csm_1bs_sizes():
    read = frame_bytes(CsmWeights.empty(CONFIG, torch.bfloat16, "meta"))
    backbone, depth, head, projection = 973e6, 111e6, 2048 * 2051, 2048 * 1024
    heads = DEPTH_STEPS * 1024 * 2051
    assert read.once / 2 == pytest.approx(backbone + head + projection + heads, rel=1e-3)
    assert read.step / 2 == pytest.approx(depth, rel=3e-3)
    assert read.steps == DEPTH_STEPS
    assert read.total == read.once + DEPTH_STEPS * read.step


def test_a_cache_saves_reads_of_all_steps_but_the_first():
    read = FrameBytes(once=1000, step=100, steps=31)
    assert read.from_memory(0) == read.total == 4100
    assert read.from_memory(40) == 1000 + 100 + 30 * 60
    assert read.from_memory(100) == read.from_memory(500) == 1100


def test_llama_cpp_reads_our_weights_without_the_projection():
    """The same matrices, but heads padded to whole blocks of rows, and norms in float32."""
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
    # Everything except the norms' scales, which stay float32.
    assert llama_frame_bytes(CONFIG, gguf_format).total == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_rounds_put_every_peer_in_every_position_twice(n):
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
        # Ratios need our own figure from the same group.
        assert all(Peer("voxkern", peer.precision) in group for peer in group)


def test_ratios_and_percentages_are_per_round():
    """A round in which the machine runs at half speed changes neither."""
    read = FrameBytes(once=10**9, step=0, steps=31)
    ours = Rounds(read, "", ms=[100.0, 200.0, 100.0], bandwidth=[20e9, 10e9, 20e9])
    theirs = Rounds(read, "", ms=[300.0, 600.0, 250.0], bandwidth=ours.bandwidth)
    assert ratio(theirs, ours) == (3.0, 2.5, 3.0)
    assert ratio(None, ours) is None
    assert ours.percent_of_roofline(read.total) == pytest.approx(50.0)


def test_bytes_of_misotts():
    config = config_for(False, "miso-8b")
    read = frame_bytes(CsmWeights.empty(config, torch.bfloat16, "meta"))
    layer = 2 * (4096 * 4096 + 1024 * 4096) + 3 * 14336 * 4096 + 2 * 4096
    depth_layer = 2 * (1536 * 1536 + 384 * 1536) + 3 * 6912 * 1536 + 2 * 1536
    heads = 2051 * 4096 + 1536 * 4096 + 31 * 2051 * 1536
    once = 2 * (32 * layer + 4096 + heads)
    assert read == FrameBytes(once, 2 * (8 * depth_layer + 1536), 31)
    tables = (128256 + 32 * 2051) * 4096 + 32 * 2051 * 1536
    assert weight_bytes(config, torch.bfloat16, "none") == once + read.step + 2 * tables


def test_working_sets_leave_out_unknown_caches():
    names = [name for name, _ in working_sets(0, 32 << 20, threads=2)]
    assert names == ["half of L3", "L3", "twice L3", "memory"]
    assert dict(working_sets(1 << 20, 0, threads=4))["half of L2 each"] == 2 << 20


@pytest.mark.parametrize("packing", ["none", "int8", "int4"])
def test_teacher_forced_logits_are_the_sampled_logits(packing):
    """Greedy codes are the argmax of the logits in every utterance and frame."""
    sizes = TransformerConfig(2, 64, 4, 2, 16, 96, 1e-5, 64, 1e4, None)
    config = CsmConfig(sizes, replace(sizes, dim=32), 4, 37, 50)
    plain = CsmWeights.random(config, torch.float32)
    model = CsmModel(config, packed(plain, PACKINGS[packing], torch.float32))
    prompts = random_speech(config).prompts[:2]
    long, short = _greedy(model, prompts[0], 3), _greedy(model, prompts[1], 1)
    logits = teacher_forced(model, Speech([prompts[1], prompts[0]], [short, long]))
    # One row a step, longer utterance first; code0 has one more row after each last frame.
    drawn = torch.stack((long[0], short[0], long[1], long[2]))
    assert logits.code0.argmax(-1)[[0, 1, 2, 4]].tolist() == drawn[:, 0].tolist()
    assert len(logits.code0) == 6
    assert logits.depth.argmax(-1).view(4, 3).tolist() == drawn[:, 1:].tolist()


def _greedy(model: CsmModel, prompt: Prompt, num_frames: int) -> torch.Tensor:
    cache = KvCache(model.config.backbone, 1, model.dtype, model.device)
    sequence = CacheSequence()
    batch = CacheBatch.prefill(cache, [sequence], [len(prompt.frames)])
    rows = SamplingRows.of([SamplingParams(temperature=0)], [0], model.device)
    inputs, codes = prompt[:2], []
    for _ in range(num_frames):
        hidden = model.backbone_step(*inputs, batch, cache)
        codes.append(model.draw_frames(hidden, rows))
        inputs, batch = model.next_inputs(codes[-1]), CacheBatch.decode(cache, [sequence])
    return torch.cat(codes)


def test_divergence_is_kl_and_argmax_agreement():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    kl = (0.5 * math.log(2) - 0.25 * math.log(2)) / 2
    assert divergence(p.log(), q.log() + 3) == pytest.approx((kl, 50.0), rel=1e-6)
    assert divergence(p.log(), p.log() + 3) == pytest.approx((0.0, 100.0), abs=1e-6)


def test_weights_are_packed_in_the_requested_formats():
    config = CsmConfig.from_json({**CSM_1B, "text_vocab_size": 16})
    plain = CsmWeights.empty(config, torch.float32, "meta")
    asked = []

    def note(x: torch.Tensor, format: str) -> torch.Tensor:
        asked.append((tuple(x.shape), format))
        return x

    weights = packed(plain, {"depth": "int4", "code_heads": "int8"}, torch.bfloat16, note)
    matrices = [getattr(plain.depth, name) for name in ("qkv", "o", "gate_up", "down")]
    wanted = [(tuple(m.shape), "int4") for m in matrices]
    wanted += [(tuple(plain.code_heads.shape), "int8")]
    assert sorted(asked) == sorted(wanted)
    assert weights.depth.norm.dtype == weights.backbone.down.dtype == torch.bfloat16


def test_the_processor_name_comes_from_proc_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    one = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    cpuinfo.write_text(f"{one}\n{one.replace('AMD', 'another')}")
    assert machine.processor(cpuinfo) == "AMD EPYC (family 25, model 17)"
    cpuinfo.write_text("processor : 0\nmodel name : Some Arm\n")
    assert machine.processor(cpuinfo) == "Some Arm"


def test_a_failed_install_leaves_out_that_peer_alone(monkeypatch, tmp_path):
    """A peer that cannot be installed (offline, no compiler) is left out and tried only once."""
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, int("llama-cpp-python==0.3.36" in command))

    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "peers")
    monkeypatch.setattr(peers.subprocess, "run", run)
    (tmp_path / "peers" / "venv").mkdir(parents=True)
    peers._install.cache_clear()
    assert peers.environment("voxkern") == Path(sys.executable)
    assert not calls
    assert peers.environment("transformers") == peers.PYTHON
    installed = len(calls)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"not installed, see peers/install-llama\.cpp\.log"):
            peers.environment("llama.cpp")
    assert len(calls) == installed + 2
    peers._install.cache_clear()
    assert peers.environment("transformers") == peers.PYTHON
    assert len(calls) == installed + 2
    peers._install.cache_clear()
