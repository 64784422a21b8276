"""CSM in GGUF files, with csm.rs' and CrispASR's names: codes, codec, tokenizer, precisions."""

import logging
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import write_adapter
from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate
from engine_testing import GREEDY, run_one
from gguf_files import held, held_values, q4_k, write_crispasr, write_csm_rs
from vox_serve import gguf_header
from vox_serve.checkpoint import CheckpointError, TensorFiles
from vox_serve.gguf_header import read_header
from vox_serve.gguf_tensors import GgufTensors
from vox_serve.loading import cache_folders, load_engine
from vox_serve.model_files import gguf_of
from vox_serve.prompt import Segment
from vox_serve.weights import load_checkpoint, load_codec
from voxkern.quantize import pack, unpack

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")

TEXT = "this is that thing"
BLOCKS = TinyShape(
    layers=1,
    dim=256,
    heads=8,
    head_dim=32,
    ffn=256,
    depth_layers=1,
    depth_dim=256,
    depth_kv_heads=2,
    depth_head_dim=64,
    depth_ffn=256,
    depth_norm_eps=1e-5,
)
"""Rows of 256 values, which Q4_K needs."""


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(BLOCKS, seed=2, rope="csm")


def beside(tiny, folder: Path) -> Path:
    """Write config.json, tokenizer.json and the codec's file, without weights."""
    tiny.write(folder, codec="mimi")
    (folder / "model.safetensors").unlink()
    return folder


def spoken(path: Path, text: str = TEXT, **settings) -> tuple:
    engine = load_engine(str(path), dtype="float32", device="cpu", **settings)
    return run_one(engine, text=text, speaker=1, sampling=GREEDY, max_frames=6)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k"])
def test_codes_of_crispasrs_file_equal_transformers(tiny, tmp_path, kind):
    """A folder that holds the file and nothing else: tokenizer and codec are in it."""
    path = write_crispasr(tmp_path / f"csm-1b-{kind}.gguf", tiny, kind)
    expected = held(tiny, kind, "crispasr", tmp_path / "expected")
    codes, audio, _ = spoken(path)
    assert torch.equal(codes, reference_generate(expected, [Segment(1, TEXT)], 6))
    assert len(audio) == 6 * 1920
    if kind == "f32":
        assert len(codes.unique()) > 10


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k"])
def test_codes_of_csm_rs_file_equal_transformers(tiny, tmp_path, kind, layout):
    folder = beside(tiny, tmp_path / "model")
    write_csm_rs(folder / "q.gguf", tiny, kind, layout)
    expected = held(tiny, kind, layout, tmp_path / "expected")
    codes, *_ = spoken(folder)
    assert torch.equal(codes, reference_generate(expected, [Segment(1, TEXT)], 6))


def test_rows_that_no_block_divides_stay_float16(tmp_path):
    """As in CSM-1B's code heads: several types in a file, and untied tables."""
    tiny = build_tiny(seed=3, tied=False)
    folder = beside(tiny, tmp_path / "model")
    write_csm_rs(folder / "q.gguf", tiny, "q8_0")
    types = {place.type.name for place in read_header(folder / "q.gguf").tensors.values()}
    assert types == {"F16", "Q8_0"}
    expected = held(tiny, "q8_0", "hf", tmp_path / "expected")
    codes, *_ = spoken(folder / "q.gguf")
    assert torch.equal(codes, reference_generate(expected, [Segment(1, TEXT)], 6))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_codec_of_crispasrs_file(tiny, tmp_path, kind):
    """Fused attention, codebooks divided by their usage, and dimensions that were dropped."""
    path = write_crispasr(tmp_path / "csm.gguf", tiny, kind)
    mimi = load_codec(load_checkpoint(path, torch.float32))
    expected = load_codec(load_checkpoint(tiny.write(tmp_path / "model"), torch.float32))
    assert mimi.config == expected.config
    codes = torch.randint(0, 64, (1, 5, 4), generator=torch.Generator().manual_seed(0))
    audio, true = mimi.decode(codes), expected.decode(codes)
    error = float((audio - true).norm() / true.norm())
    assert error < (1e-5 if kind == "f32" else 0.05)
    sound = 0.1 * torch.randn(1, 1, 5 * 1920, generator=torch.Generator().manual_seed(1))
    same = mimi.encode(sound[0], 4) == expected.encode(sound[0], 4)
    assert same.all() if kind == "f32" else same.float().mean() > 0.5


def test_the_codec_of_csm_rs_file(tiny, tmp_path):
    path = write_csm_rs(tmp_path / "q8.gguf", tiny, "q8_0", codec=True)
    beside(tiny, tmp_path)
    checkpoint = load_checkpoint(path, torch.float32)
    assert checkpoint.codec_tensors is not None
    (tmp_path / "mimi.safetensors").unlink()
    load_codec(checkpoint)


def test_another_codec_than_that_of_the_file(tiny, tmp_path):
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "q4_k")
    other = build_tiny(BLOCKS, seed=4, rope="csm").write(tmp_path / "other", codec="mimi")
    codes = torch.randint(0, 64, (1, 5, 4), generator=torch.Generator().manual_seed(0))
    engine = load_engine(str(path), codec=str(other), context="none")
    expected = load_codec(load_checkpoint(other, torch.float32))
    assert torch.equal(engine.mimi.decode(codes), expected.decode(codes))
    assert not torch.equal(load_engine(str(path)).mimi.decode(codes), expected.decode(codes))


def test_the_tokenizer_of_the_file(tiny, tmp_path):
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "f16")
    prompts = load_engine(str(path), context="none").prompts
    for text in (TEXT, "the lazy dog, and THE fox"):
        ids = tiny.tokenizer.encode(f"[0]{text}", add_special_tokens=False).ids
        assert prompts.tokens(Segment(0, text))[1:-1] == ids
    special = prompts.tokens(Segment(0, "a<|end_of_text|>"))
    assert special.count(tiny.tokenizer.token_to_id("<|end_of_text|>")) == 1
    bare = write_crispasr(tmp_path / "bare.gguf", tiny, "f16", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"bare.gguf holds no tokenizer: put the tokenizer"):
        load_engine(str(bare), context="none")
    tiny.tokenizer.save(str(tmp_path / "tokenizer.json"))
    load_engine(str(bare), context="none")


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_second_rounding_is_measured_and_said(tiny, tmp_path, caplog, kind, quantize):
    caplog.set_level(logging.WARNING, "vox_serve")
    path = write_crispasr(tmp_path / "csm.gguf", tiny, kind)
    weights = load_checkpoint(path, torch.bfloat16, quantize=quantize).weights
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"csm.gguf: weights in {kind} were rounded once more, to ")
    assert " to bfloat16 by 0.1" in line
    if quantize == "none":
        assert "int" not in line
        return
    said = float(line.partition(f"to {quantize} by ")[2].partition(" %")[0]) / 100
    values = held_values(tiny.tensors["backbone_model.layers.0.mlp.down_proj.weight"], kind)
    error = unpack(weights.backbone.down[0]) - values
    measured = float(error.norm() / values.norm())
    assert 0.5 * measured < said < 2 * measured
    assert said < {"int8": 0.02, "int4": 0.2}[quantize]


def test_float32_keeps_every_value(tiny, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "vox_serve")
    weights = load_checkpoint(write_crispasr(tmp_path / "a.gguf", tiny, "q8_0"), torch.float32)
    expected = held_values(tiny.tensors["backbone_model.layers.0.mlp.down_proj.weight"], "q8_0")
    assert torch.equal(weights.weights.backbone.down[0], expected)
    assert not caplog.records


def test_q8_0_and_int8_of_the_same_weights_agree(tiny, tmp_path):
    """int8 of the file's values differs from int8 of the true ones by no more than both roundings:
    that of q8_0, half a step of each 32 values, and twice half a step of a row."""
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "q8_0")
    ours = load_checkpoint(path, torch.float32, quantize="int8").weights.backbone.down[0]
    true = tiny.tensors["backbone_model.layers.0.mlp.down_proj.weight"]
    theirs = unpack(pack(true, "int8"))
    row_step = true.abs().amax(1, keepdim=True) / 127
    group_step = true.view(len(true), -1, 32).abs().amax(2).repeat_interleave(32, 1) / 127
    difference = (unpack(ours) - theirs).abs()
    assert bool((difference <= 1.02 * (0.5 * group_step + row_step)).all())
    assert float((unpack(ours) - true).norm() / true.norm()) < 0.015


def test_rows_of_one_scale_are_exact_in_int8():
    """int8 keeps each value of q8_0 rows whose groups share a scale: the one case in which a scale
    per row can hold what a scale per 32 columns did."""
    integers = torch.randint(-126, 127, (16, 64)).float()
    integers[:, ::32] = 127
    values = held_values(integers * 0.0078125, "q8_0")
    assert torch.equal(unpack(pack(values, "int8")), values)


def test_other_weights_in_the_folder_come_first(tiny, tmp_path):
    folder = tiny.write(tmp_path / "model")
    file = write_crispasr(folder / "csm.gguf", tiny, "f16")
    assert gguf_of(folder) is None
    assert gguf_of(file) == file
    (folder / "model.safetensors").unlink()
    assert gguf_of(folder) == file
    shutil.copy(file, folder / "other.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files: give the path of one, such as"):
        gguf_of(folder)
    assert (
        cache_folders(None, file, False)[0] != cache_folders(None, folder / "other.gguf", False)[0]
    )


@pytest.mark.parametrize(("names", "kind"), [("crispasr", "f32"), ("original", "q8_0")])
def test_an_adapter_on_a_gguf_file(tiny, tmp_path, names, kind):
    """The weights are those of the same values in safetensors with the adapter, to the bit."""
    adapter = write_adapter(tiny, tmp_path / "adapter")
    folder = beside(tiny, tmp_path / "model")
    if names == "crispasr":
        write_crispasr(folder / "csm.gguf", tiny, kind)
    else:
        write_csm_rs(folder / "csm.gguf", tiny, kind, names)
    held(tiny, kind, names, tmp_path / "expected")
    expected = load_checkpoint(tmp_path / "expected", torch.float32, adapter=adapter)
    loaded = load_checkpoint(folder, torch.float32, adapter=adapter)
    for name, tensor in loaded.weights.named().items():
        assert torch.equal(tensor, expected.weights.named()[name]), name


def test_packed_weights_are_kept_for_later_starts(tiny, tmp_path, caplog, monkeypatch):
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "q8_0")
    caches = cache_folders(None, path, small=False)[:1]
    assert caches == [tmp_path / ".voxkern" / "csm"]
    first = load_checkpoint(path, torch.float32, quantize="int8", cache_folders=caches)
    caplog.clear()
    again = load_checkpoint(path, torch.float32, quantize="int8", cache_folders=caches)
    assert not caplog.records  # nothing was rounded
    for name, tensor in first.weights.named().items():
        assert torch.equal(again.weights.named()[name], tensor)
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda package: "0")
        load_checkpoint(path, torch.float32, quantize="int8", cache_folders=caches)
    (record,) = caplog.records  # another version of the package may decode blocks otherwise
    assert "were rounded once more" in record.getMessage()
    write_crispasr(path, build_tiny(BLOCKS, seed=3, rope="csm"), "q8_0")
    other = load_checkpoint(path, torch.float32, quantize="int8", cache_folders=caches)
    assert not torch.equal(other.weights.backbone.down, first.weights.backbone.down)


def test_sizes_without_a_config(tmp_path):
    """csm.rs stores CSM-1B's sizes whatever it converts, and reads no others."""
    tiny = build_tiny()
    path = write_csm_rs(tmp_path / "q8.gguf", tiny, "q8_0")
    said = r"q8.gguf \(no config.json beside it\): hidden_size is 2048 \(by default\), but the "
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path, torch.float32)


def test_blocks_of_csm_rs_own_q4_k_are_refused(tiny, tmp_path):
    """Its script stores the least value as dmin and no minima of the groups."""
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "csm")
    blocks = q4_k(np.random.default_rng(0).standard_normal((4, 256), np.float32))
    blocks.view(np.float16)[:, 1] = -0.5
    writer.add_tensor("lm_head.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .*csm.rs' scripts.*take a q8_0"):
        TensorFiles([tmp_path / "a.gguf"]).read("lm_head.weight")


def test_types_are_the_packages():
    for number, kind in gguf_header.TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (kind.name, *kind[1:]) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k"])
def test_the_header_is_what_the_packages_reader_finds(tiny, tmp_path, kind):
    path = write_crispasr(tmp_path / "csm.gguf", tiny, kind)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(header.tensors)
    for tensor in theirs.tensors:
        place = header.tensors[tensor.name]
        assert place.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (place.start, place.num_bytes) == (tensor.data_offset, tensor.n_bytes)
    for key, value in header.metadata.items():
        assert theirs.fields[key].contents() == value


def test_every_type_of_block_is_read(tmp_path):
    """Types whose blocks the package can write, against its own values."""
    values = np.random.default_rng(0).standard_normal((5, 512), np.float32)
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"]
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "csm")
    expected = {}
    for kind in kinds:
        type_ = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quants.quantize(values, type_)
        writer.add_tensor(kind, blocks, raw_dtype=type_)
        expected[kind] = torch.from_numpy(gguf.quants.dequantize(blocks, type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = GgufTensors(tmp_path / "a.gguf")
    for kind in kinds:
        assert torch.equal(tensors.read(kind).float(), expected[kind])
        assert torch.equal(tensors.rows(kind, 2, 4).float(), expected[kind][2:4])
    assert tensors.rounded == kinds[:5]
