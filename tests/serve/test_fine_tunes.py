"""Layouts that people's fine-tunes of CSM have: each loads, or fails in one line that says what to
do."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import build_tiny
from engine_testing import GREEDY, run_one
from limits import refusal
from vox_serve import hub
from vox_serve.config import Config
from vox_serve.loading import load_engine
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import PromptBuilder
from vox_serve.weights import load_checkpoint

LAYOUTS = ("hf", "original")


@pytest.fixture
def tiny():
    return build_tiny()


def edit(folder, change) -> None:
    """Replace the tensors of model.safetensors by `change` of them."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def assert_same(folder, expected, **options) -> None:
    got = load_checkpoint(folder, torch.float32, **options).weights.named()
    for name, tensor in expected.weights.named().items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "base_model.model."])
def test_a_prefix_before_the_names(tiny, layout, prefix, tmp_path):
    folder = tiny.write(tmp_path, layout)
    expected = load_checkpoint(folder, torch.float32)
    edit(folder, lambda tensors: {f"{prefix}{name}": t for name, t in tensors.items()})
    assert_same(folder, expected)
    if layout == "hf":
        assert load_checkpoint(folder, torch.float32).codec_tensors


def test_several_dtypes_in_one_file(tiny, tmp_path):
    """As unsloth merges: layers in float16, embeddings in float32."""
    folder = tiny.write(tmp_path)

    def halved(tensors):
        return {n: t.half() if ".layers." in n else t for n, t in tensors.items()}

    edit(folder, halved)
    got = load_checkpoint(folder, torch.float32).weights
    tensors = load_file(folder / "model.safetensors")
    q = tensors["backbone_model.layers.0.self_attn.q_proj.weight"]
    assert q.dtype == torch.float16
    assert torch.equal(got.backbone.qkv[0][: len(q)], q.float())
    assert torch.equal(got.text_table, tiny.tensors["embed_text_tokens.weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extra_tensors_are_named(tiny, layout, tmp_path, caplog):
    folder = tiny.write(tmp_path, layout)
    expected = load_checkpoint(folder, torch.float32)
    assert "left out" not in caplog.text
    extra = {f"speaker_head.{i}.weight": torch.ones(3) for i in range(7)}
    extra["backbone_causal_mask"] = torch.ones(4, 4, dtype=torch.bool)
    edit(folder, lambda tensors: tensors | extra)
    with caplog.at_level(logging.WARNING, "vox_serve"):
        assert_same(folder, expected)
    assert "left out are tensors speaker_head.0.weight, " in caplog.text
    assert "speaker_head.4.weight and 2 more" in caplog.text
    assert "causal_mask" not in caplog.text


@pytest.mark.parametrize(("layout", "name"), [("hf", "lm_head.weight"), ("original", "audio_head")])
def test_a_renamed_head(tiny, layout, name, tmp_path):
    """It is not guessed: the message names the tensor that has its shape."""
    folder = tiny.write(tmp_path, layout)
    edit(folder, lambda tensors: {("my_head" if n == name else n): t for n, t in tensors.items()})
    said = refusal(load_checkpoint, folder, torch.float32)
    assert f"tensor {name} is missing in {folder / 'model.safetensors'}; if my_head, which" in said
    edit(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "my_head"})
    said = refusal(load_checkpoint, folder, torch.float32)
    assert said == f"tensor {name} is missing in {folder / 'model.safetensors'}"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_trainers_pickled_state(tiny, key, tmp_path):
    expected = load_checkpoint(tiny.write(tmp_path / "plain", "original"), torch.float32)
    folder = tiny.write(tmp_path / "pickled", "pickle")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    (folder / "ckpt.pt").unlink()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({key: state, "epoch": 3, "optimizer": {"step": torch.ones(1)}}, folder / "best.pt")
    torch.save({}, folder / "optimizer.pt")
    said = refusal(load_checkpoint, folder, torch.float32)
    assert "has only best.pt, a pickle file" in said
    assert_same(folder, expected, allow_pickle=True)


def test_a_model_with_an_adapter_beside_it(tiny, tmp_path, caplog):
    """The folder of somebody who pushed both: the model is loaded, the adapter is not applied."""
    expected = load_checkpoint(tiny.write(tmp_path / "plain"), torch.float32)
    folder = tiny.write(tmp_path / "both")
    (folder / "model.safetensors").rename(folder / "csm.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert_same(folder, expected)
    assert f"{folder} also holds a LoRA adapter, which is not applied" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised ('bitsandbytes'; "),
        ({"quantization": {"bits": 8, "group_size": 64}}, "quantised (MLX; "),
        ({"quantization_config": 4}, "quantised (by another program; "),
    ],
)
def test_weights_that_others_quantised(tiny, settings, said, tmp_path):
    folder = tiny.write(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    load_checkpoint(folder, torch.float32)  # config.json may be older than the weights

    def packed(tensors):
        name = "backbone_model.layers.0.self_attn.q_proj.weight"
        codes = torch.zeros(10, 1, dtype=torch.uint8)
        return tensors | {name: codes, f"{name}.absmax": torch.ones(1)}

    edit(folder, packed)
    message = refusal(load_checkpoint, folder, torch.float32)
    assert said in message
    assert "take the float16, bfloat16 or float32 weights" in message


def test_factors_that_are_not_merged(tiny, tmp_path):
    folder = tiny.write(tmp_path, "original")
    name = "backbone.layers.0.attn.q_proj.lora_A"
    edit(folder, lambda tensors: tensors | {name: torch.ones(2, 64)})
    assert "has LoRA factors that are not merged" in refusal(load_checkpoint, folder, torch.float32)


def test_csm_hf_is_refused(tiny, tmp_path):
    folder = tiny.write(tmp_path, "original")
    (folder / "config.json").write_text('{"model_type": "csm", "backbone_config": {}}')
    assert "backbone_config is of csm-hf" in refusal(load_checkpoint, folder, torch.float32)


def test_a_codec_vocabulary_beside_the_texts():
    """Conversions for MLX give both; vocab_size is the text's there."""
    config = CsmConfig.from_json({"audio_vocab_size": 2051, "vocab_size": 128256})
    assert config.audio_vocab_size == 2051


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 10_000.0}])
def test_rope_of_a_flavor(rope):
    """`model_type` beside a flavor does not make RoPE transformers' default."""
    config = CsmConfig.from_json({"model_type": "sesame", "backbone_flavor": "llama-1B", **rope})
    assert config.depth.rope_scaling.factor == 32
    assert config.backbone.rope_theta == (10_000.0 if rope else 500_000.0)


def test_another_tokenizer(tiny, tmp_path):
    folder = tiny.write(tmp_path / "model")
    config = CsmConfig.from_json(tiny.config)
    (tmp_path / "other").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "other" / "tokenizer.json")
    said = refusal(PromptBuilder.from_folder, folder, config)
    assert f"{folder} has no tokenizer.json: CSM uses that of Llama 3.2, which --tokenizer" in said
    for name in (tmp_path / "other", tmp_path / "other" / "tokenizer.json"):
        engine = load_engine(folder, dtype="float32", tokenizer=str(name))
        codes, _, _ = run_one(engine, text="hello", sampling=GREEDY, max_frames=1)
        assert len(codes) == 1
    with pytest.raises(hub.ModelNotFoundError, match=r"is no tokenizer.json: give that file"):
        hub.resolve_tokenizer(str(folder / "config.json"))
    with pytest.raises(hub.ModelNotFoundError, match=r"no tokenizer './gone': it is no folder"):
        hub.resolve_tokenizer("./gone")


def test_the_number_of_speakers():
    assert CsmConfig.from_json({}).num_speakers == 2
    assert CsmConfig.from_json({"num_speakers": 1000}).num_speakers == 1000
    with pytest.raises(ValueError, match="num_speakers must be a whole number from 1"):
        CsmConfig.from_json({"num_speakers": 0})
    assert Config().for_speakers(1000).speaker_limit == 999
    assert Config(max_speaker=4).for_speakers(1000).speaker_limit == 4
    assert Config().speaker_limit == 1
