"""The sizes and the codec of the tiny checkpoint, for the tests of files."""

import pytest

from checkpoints import build_tiny
from vox_serve.mimi import mimi_from_checkpoint
from vox_serve.model_config import CsmConfig


@pytest.fixture(scope="module")
def config() -> CsmConfig:
    return CsmConfig.from_json(build_tiny().config)


@pytest.fixture(scope="module")
def mimi():
    tiny = build_tiny()
    prefix = "codec_model."
    tensors = {n.removeprefix(prefix): t for n, t in tiny.tensors.items() if n.startswith(prefix)}
    return mimi_from_checkpoint(tensors, tiny.config["codec_config"])
