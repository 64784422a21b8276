"""The language model's forward pass and its training sequences."""

import numpy as np
import torch

import lm
import lm_data
import train_lm
from checkpoints import TinyShape, build_tiny
from common import FRAME_SAMPLES


def test_forward_is_transformers():
    model = build_tiny(TinyShape(), rope="default").model
    config = model.config
    codes = torch.randint(1, config.codec_config.codebook_size, (2, 7, config.num_codebooks))
    with torch.no_grad():
        backbone = model.backbone_model
        expected = backbone(input_ids=codes, use_cache=False).last_hidden_state
        table = lm.rope_table(backbone, torch.arange(7)[None])
        hidden, _ = lm.run_stack(backbone, lm.embed_frames(model, codes), table)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        rows, wanted = hidden.flatten(0, 1), codes.flatten(0, 1)
        ids = torch.nn.functional.pad(wanted[:, :-1], (1, 0))
        theirs = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=rows).logits
        mine = lm.depth_logits(model, rows, wanted)
        torch.testing.assert_close(mine, theirs[:, -mine.shape[1] :], rtol=1e-4, atol=1e-4)


def test_corruption_replaces_history_by_codes_of_other_frames():
    torch.manual_seed(1)
    codes = torch.arange(1, 401).view(4, 100, 1) + torch.tensor([0, 1000, 2000])
    is_frame = torch.ones(4, 100, dtype=torch.bool)
    changed = train_lm.corrupt(codes, is_frame)
    assert torch.equal(changed // 1000, codes // 1000)  # every code still belongs to its codebook
    share = (changed != codes).float().mean((1, 2))
    assert 0.02 < share.mean() < 0.6
    semantic, pulse, acoustic = ((changed != codes)[..., k].float().mean() for k in range(3))
    assert semantic < acoustic
    assert pulse < acoustic


def test_a_question_mark_before_a_word_takes_no_time():
    phones = [("", 10), ("s", 20), ("i", 30), (" ", 40), ("x", 50), ("?", 60), ("", 70)]
    marked = lm_data.align_text(["s", "i", " ", "?", "x", "?"], phones)
    assert marked.tolist() == [10, 20, 30, 40, 40, 50, 60, 70]
    plain = lm_data.align_text(["s", "i", " ", "x", "?"], phones)
    assert plain.tolist() == [10, 20, 30, 40, 50, 60, 70]
    first = lm_data.align_text(["?", "s", "?"], [("", 10), ("s", 20), ("?", 30), ("", 40)])
    assert first.tolist() == [10, 10, 20, 30, 40]


def test_every_frame_is_spoken_by_its_tokens():
    example = dict(
        tokens=np.arange(5),
        token_ends=np.array([0.0, 0, 0, 1.5, 4]) * FRAME_SAMPLES,
        codes=np.arange(8, dtype=np.int16).reshape(4, 2) + 1,
        labels=np.zeros((4, 4), np.int64),
    )
    spans = lm_data.spans(example)
    np.testing.assert_allclose(spans.sum(1), 1)
    np.testing.assert_allclose(spans[:2, 3:], [[1, 0], [0.5, 0.5]])
    batch = lm_data.collate([[example]], 2)
    assert batch["codes"][0, 5].tolist() == [1, 2]
    assert batch["targets"][0, 4].tolist() == [1, 2]  # the last token predicts the first frame
    assert batch["targets"][0, 8].tolist() == [0, 0]  # and the last frame predicts the stop frame
    assert (batch["targets"][0, 9:] == -100).all()
