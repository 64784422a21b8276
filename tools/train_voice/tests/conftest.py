"""Fixtures for the tests of training."""

import json

import pytest
from transformers import MimiModel

import codec
from common import FRAME_SAMPLES


@pytest.fixture
def small_codec() -> MimiModel:
    config = codec.make_config(4)
    config.num_filters, config.hidden_size, config.intermediate_size = 8, 96, 64
    config.num_hidden_layers, config.upsample_groups = 1, 96
    config.num_attention_heads = config.num_key_value_heads = 2
    return MimiModel(config).eval()


@pytest.fixture
def write_speech(tmp_path):
    """Writes silent utterances of `num_frames` each into tmp_path, as make_data.py does."""

    def write(rows, num_frames):
        samples = num_frames * FRAME_SAMPLES
        place = dict(num_samples=samples)
        rows = [row | place | dict(start_sample=i * samples) for i, row in enumerate(rows)]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "0000.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
        (tmp_path / "data" / "0000.i16").write_bytes(bytes(2 * samples * len(rows)))

    return write
