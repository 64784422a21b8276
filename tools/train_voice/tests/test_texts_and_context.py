"""Long sentences, and training sequences with earlier segments."""

import random

import numpy as np
import pytest
import torch

import lm_data
import predict_codes
import texts
import train_lm
from checkpoints import TinyShape, build_tiny
from common import FRAME_SAMPLES
from lm import embed_frames


def example(num_tokens: int, num_frames: int, first_code: int, num_codebooks: int = 2):
    codes = first_code + np.arange(num_frames * num_codebooks, dtype=np.int16)
    return dict(
        tokens=first_code + np.arange(num_tokens),
        token_ends=np.linspace(0, num_frames * FRAME_SAMPLES, num_tokens),
        codes=codes.reshape(num_frames, num_codebooks),
        labels=np.full((num_frames, 4), first_code),
    )


def test_context_precedes_as_in_a_prompt():
    before, spoken = example(3, 2, 1), example(4, 3, 50)
    batch = lm_data.collate([[before, spoken], [spoken]], 2)
    # 3 tokens, 2 frames, a stop frame; 4 tokens, 3 frames; padding to 16.
    is_text = [True] * 3 + [False] * 3 + [True] * 4 + [False] * 6
    assert batch["is_text"][0].tolist() == is_text
    assert batch["codes"][0, 3:6].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert batch["codes"][0, 10:13].tolist() == spoken["codes"].tolist()
    targets = batch["targets"][0]
    assert targets[2:5].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert (targets[5:9] == -100).all()  # the stop frame and all but the last token predict nothing
    assert targets[9:13].tolist() == [*spoken["codes"].tolist(), [0, 0]]
    assert (targets[13:] == -100).all()
    shares = batch["spoken"][0]
    assert torch.equal(shares.sum(1) > 0, batch["labels"][0, :, 0] > 0)
    assert (shares[9:12, :6] == 0).all()  # a frame is spoken by tokens of its own segment
    torch.testing.assert_close(shares[9:12, 6:10], batch["spoken"][1, 3:6, :4])


def test_training_reads_sequences_with_context():
    torch.manual_seed(0)
    model = build_tiny(TinyShape(), rope="default").model
    count = model.config.num_codebooks
    phone_head = torch.nn.Linear(model.config.hidden_size, 4 * 60)
    phone_head.phones = 60
    one, other = example(4, 3, 1, count), example(5, 2, 9, count)
    batch = lm_data.collate([[one, other], [one]], count)
    train_lm.WATCHED_LAYER, train_lm.NEXT_HEAD = 0, 1
    found = train_lm.losses(model, phone_head, batch, train=True)
    assert all(torch.isfinite(loss) for loss in found.values())
    # The codes of a segment change the loss of the segment after it.
    other_codes = {**batch, "codes": batch["codes"].clone()}
    other_codes["codes"][0, 4:7] = 5
    a, b = (
        train_lm.losses(model, phone_head, x, train=False)["code0"] for x in (batch, other_codes)
    )
    assert a != b


def test_predicted_codes_keep_the_sounds_and_follow_each_other():
    torch.manual_seed(0)
    model = build_tiny(TinyShape(), rope="default").model
    count = model.config.num_codebooks
    examples = [example(4, 3, 1, count), example(5, 2, 9, count)]
    batch = lm_data.collate([[e] for e in examples], count)
    drawn = predict_codes.predict(model, batch, passes=1)
    true = torch.from_numpy(np.concatenate([e["codes"] for e in examples])).long()
    assert drawn.shape == true.shape
    assert torch.equal(drawn[:, :2], true[:, :2])
    assert not torch.equal(drawn, true)
    # A prediction follows from those before it in its frame, and from true frames before.
    hidden = []
    for e in examples:
        tokens, frames = torch.from_numpy(e["tokens"])[None], torch.from_numpy(e["codes"])[None]
        x = torch.cat(
            (model.embed_text_tokens(tokens), embed_frames(model, frames[:, :-1].long())), dim=1
        )
        states = model.backbone_model(inputs_embeds=x, use_cache=False).last_hidden_state
        hidden.append(states[0, tokens.shape[1] - 1 :])
    ids = torch.nn.functional.pad(drawn[:, :-1], (1, 0))
    logits = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=torch.cat(hidden)).logits
    logits = logits[..., : model.config.codec_config.codebook_size]
    assert torch.equal(logits[:, -(count - 2) :].argmax(-1), drawn[:, 2:])
    # The second pass reads the first pass's frames as history.
    for e, codes in zip(examples, drawn.split([len(e["codes"]) for e in examples]), strict=True):
        e["codes"] = codes.numpy()
    heard = lm_data.collate([[e] for e in examples], count)
    again = predict_codes.predict(model, batch, passes=2)
    assert torch.equal(again, predict_codes.predict(model, heard, passes=1))
    assert not torch.equal(again, drawn)


def test_sequences_hold_every_example_once():
    rng = np.random.default_rng(0)
    examples = [example(3 + i % 40, 10 + i % 90, 1) for i in range(500)]
    stream = lm_data.batches(examples, range(500), rng, 2048)
    sequences = []
    while sum(map(len, sequences)) < 500:
        group = next(stream)
        sizes = [lm_data.length_of([examples[i] for i in sequence]) for sequence in group]
        assert len(group) == 1 or len(group) * max(sizes) <= 2048
        assert max(sizes) <= lm_data.MAX_POSITIONS
        sequences += group
    assert sorted(i for sequence in sequences for i in sequence) == list(range(500))
    counts = np.bincount([len(sequence) for sequence in sequences])
    assert len(counts) == 2 + lm_data.MAX_CONTEXT
    assert counts[1] / len(sequences) == pytest.approx(1 - lm_data.CONTEXT_SHARE, abs=0.1)


def test_long_sentences_join_clauses():
    rng = random.Random(0)
    made = [texts.long_sentence(rng, ["A red hat.", "She left early today."]) for _ in range(200)]
    lengths = [len(text.split()) for text in made]
    assert max(lengths) <= texts.LONG_WORDS[1]
    assert np.mean(np.array(lengths) >= 15) > 0.9
    assert all(text[0].isupper() and text[-1] in ".?!" for text in made)
    assert not any("A red" in text[1:] for text in made)
    assert texts.as_clause("Anna and I left.") == "Anna and I left"
    assert texts.as_clause("The cat sat.") == "the cat sat"


def test_long_test_sentences_are_long_and_differ():
    found = texts.long_test_sentences(100)
    assert len(set(found)) == 100
    assert all(20 <= len(text.split()) <= 30 for text in found)
