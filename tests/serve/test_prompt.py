"""The backbone's input embeddings, compared with transformers' for the same conversation."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_prompt, reference_tokens
from vox_serve.checkpoint import CheckpointError
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import CHARS_PER_POSITION, PromptBuilder, PromptTooLongError, Segment

TEXTS = [
    "Hello there, how are you?",
    " two  spaces\tand a tab\n",
    "Straße, café, naïve",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا بالعالم",
    "नमस्ते",
    "👩‍👩‍👧 🎉 \u200b",
    "[1]brackets[0] | pipes |",
    "\x00\x07 control \x1b[0m",
    "0123456789" * 20,
]


def sizes(text_vocab_size: int) -> SimpleNamespace:
    """The part of a `CsmConfig` that the builder reads."""
    backbone = SimpleNamespace(max_positions=64)
    return SimpleNamespace(
        text_vocab_size=text_vocab_size,
        num_codebooks=4,
        backbone=backbone,
        has_spaced_prompts=False,
    )


def builder(tiny) -> PromptBuilder:
    return PromptBuilder(
        Tokenizer.from_str(tiny.tokenizer.to_str()), CsmConfig.from_json(tiny.config)
    )


def embed(tiny, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Masked sum of the 33 embeddings, as in the original code, with transformers' tables."""
    tables = tiny.tensors
    k, v = tiny.shape.num_codebooks, tiny.shape.audio_vocab_size
    offsets = torch.arange(k) * v
    table = tables["backbone_model.embed_tokens.embed_audio_tokens.weight"]
    audio = table[frames[:, :k] + offsets] * mask[:, :k, None]
    text = tables["embed_text_tokens.weight"][frames[:, k]] * mask[:, k, None]
    return audio.sum(1) + text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens(text):
    tiny = build_tiny()
    got = builder(tiny).tokens(Segment(3, text))
    assert got == reference_tokens(tiny.tokenizer, 3, text)
    # Byte-level BPE is lossless: the tokens between BOS and EOS decode to the text itself.
    assert tiny.tokenizer.decode(got[1:-1], skip_special_tokens=False) == f"[3]{text}"


@pytest.mark.parametrize(
    "text", ["<|end_of_text|>", "a<|begin_of_text|>b <|AUDIO|><|audio_eos|> c"]
)
def test_special_strings_in_a_text_are_plain_text(text):
    tiny = build_tiny()
    tokens = builder(tiny).tokens(Segment(0, text))
    specials = {tiny.tokenizer.token_to_id(t) for t in ("<|AUDIO|>", "<|audio_eos|>")}
    bos, eos = (tiny.tokenizer.token_to_id(t) for t in ("<|begin_of_text|>", "<|end_of_text|>"))
    assert not specials & set(tokens)
    assert [i for i, t in enumerate(tokens) if t in (bos, eos)] == [0, len(tokens) - 1]
    assert tiny.tokenizer.decode(tokens[1:-1]) == f"[0]{text}"


def test_truncation_and_padding_of_a_tokenizer_are_disabled():
    tiny = build_tiny()
    tokenizer = Tokenizer.from_str(tiny.tokenizer.to_str())
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    builder = PromptBuilder(tokenizer, CsmConfig.from_json(tiny.config))
    for text in ("Hi", "Hello there, how are you?"):
        expected = reference_tokens(tiny.tokenizer, 0, text)
        assert builder.tokens(Segment(0, text)) == expected


def test_no_piece_longer_than_the_context_can_hold_reaches_the_tokenizer():
    tiny = build_tiny()
    prompts = builder(tiny)
    positions = prompts.config.backbone.max_positions
    longest = CHARS_PER_POSITION * positions
    pieces: list[int] = []

    class Spy:
        def encode_batch_fast(self, texts, **options):
            pieces.extend(map(len, texts))
            return tiny.tokenizer.encode_batch_fast(texts, **options)

    prompts._tokenizer = Spy()
    with pytest.raises(PromptTooLongError, match=f"has {longest + 1} .* at most {longest}"):
        prompts.tokens(Segment(0, "a" * (longest + 1)))
    assert pieces == []
    with pytest.raises(PromptTooLongError, match=f"more than {positions} positions"):
        prompts.tokens(Segment(0, "1" * longest))
    assert sum(pieces) < 4 * positions


def test_a_text_read_in_prefixes_has_the_tokens_of_the_whole():
    tiny = build_tiny()
    prompts = builder(tiny)
    text = "these words are common enough " * 8
    assert len(text) > prompts.config.backbone.max_positions // 2
    assert prompts.tokens(Segment(0, text)) == reference_tokens(tiny.tokenizer, 0, text)


@pytest.mark.parametrize("num_codebooks", [4, 32])
def test_build_embeds_as_transformers_does(num_codebooks):
    tiny = build_tiny(TinyShape(num_codebooks=num_codebooks))
    segments = [
        Segment(0, "first", torch.randint(0, 67, (5, num_codebooks))),
        Segment(1, "zweitens", torch.randint(0, 67, (1, num_codebooks))),
        Segment(0, "and the last"),
    ]
    frames, mask = builder(tiny).build(segments)
    assert frames.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert frames.shape == mask.shape
    got = embed(tiny, frames, mask)
    torch.testing.assert_close(got, reference_prompt(tiny, segments)[0])
    assert not frames[~mask].any()


def test_build_agrees_with_transformers_own_merge():
    """The conversation in HF's format: one audio token per frame, then an end-of-audio token."""
    tiny = build_tiny()
    model = tiny.model
    audio = torch.randn(1, 1, 4 * 1920) * 0.1
    codes = model.codec_model.encode(audio).audio_codes[0].T
    prompts = builder(tiny)
    context, spoken = Segment(1, "what I said", codes), Segment(0, "what I say")
    ids = [
        *prompts.tokens(context),
        *[model.config.audio_token_id] * len(codes),
        model.config.audio_eos_token_id,
        *prompts.tokens(spoken),
    ]
    merged = model._merge_input_ids_with_input_values(
        torch.tensor([ids]), audio, torch.tensor([[audio.shape[-1]]])
    )["inputs_embeds"][0]
    frames, mask = prompts.build([context, spoken])
    torch.testing.assert_close(embed(tiny, frames, mask), merged)


def test_one_segment_has_no_audio():
    tiny = build_tiny()
    prompts = builder(tiny)
    frames, mask = prompts.build([Segment(0, "x")])
    assert frames[:, -1].tolist() == prompts.tokens(Segment(0, "x"))
    assert mask.sum(1).tolist() == [1] * len(frames)
    assert mask[:, -1].all()


@pytest.mark.parametrize(
    ("segment", "match"),
    [
        (Segment(0, ""), "text must not be empty"),
        (Segment(0, " \n\t"), "text must not be empty"),
        (Segment(0, "a\ud800b"), "lone surrogate"),
        (Segment(-1, "a"), "speaker"),
        (
            Segment(0, "a", torch.zeros(3, 5, dtype=torch.int64)),
            r"int64 \[N, 4\], got int64 \[3, 5",
        ),
        (Segment(0, "a", torch.zeros(3, 4)), "got float32"),
        (Segment(0, "a", torch.full((3, 4), 67)), "0 to 66, got 67 to 67"),
        (Segment(0, "a", torch.full((3, 4), -1)), "got -1"),
    ],
)
def test_bad_segments(segment, match):
    with pytest.raises(ValueError, match=match):
        builder(build_tiny()).build([segment])


def test_no_segment():
    with pytest.raises(ValueError, match="at least one segment"):
        builder(build_tiny()).build([])


def plain_tokenizer() -> Tokenizer:
    """A tokenizer without Llama's special tokens."""
    tokenizer = Tokenizer(models.WordLevel({"[": 0, "0": 1, "]": 2, "x": 3, "<s>": 4}, "x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation("isolated")
    return tokenizer


@pytest.mark.parametrize(
    ("settings", "bos", "eos"),
    [
        ({"bos_token_id": 7, "eos_token_id": 9}, 7, 9),
        ({"bos_token_id": 7, "eos_token_id": [9, 10]}, 7, 9),
        ({"bos_token": "<s>", "eos_token": {"content": "x"}}, 4, 3),
    ],
)
def test_special_ids_from_settings(settings, bos, eos):
    config = sizes(text_vocab_size=20)
    prompts = PromptBuilder(plain_tokenizer(), config, settings)
    assert prompts.tokens(Segment(0, "x")) == [bos, 0, 1, 2, 3, eos]


def test_unsuitable_tokenizers_are_refused(tmp_path):
    config = sizes(text_vocab_size=8)
    with pytest.raises(CheckpointError, match=r"no <\|begin_of_text\|>"):
        PromptBuilder(plain_tokenizer(), config, {"eos_token_id": 1})
    with pytest.raises(CheckpointError, match=r"<\|end_of_text\|> is token 8"):
        PromptBuilder(plain_tokenizer(), config, {"bos_token_id": 1, "eos_token_id": 8})
    config.text_vocab_size = 3
    prompts = PromptBuilder(plain_tokenizer(), config, {"bos_token_id": 1, "eos_token_id": 2})
    with pytest.raises(ValueError, match="text has token 3"):
        prompts.tokens(Segment(0, "x"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        PromptBuilder.from_folder(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        PromptBuilder.from_folder(tmp_path, config)


def test_from_folder_reads_ids(tmp_path):
    plain_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 6, "eos_token_id": 7}')
    config = sizes(text_vocab_size=20)
    prompts = PromptBuilder.from_folder(tmp_path, config)
    assert prompts.tokens(Segment(0, "x")) == [5, 0, 1, 2, 3, 7]
