"""Which device a model is loaded to."""

import logging

import pytest
import torch

from vox_serve import loading

# conftest.py replaces it.
choose_device = loading.choose_device


@pytest.fixture
def a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "backend_for", lambda device: "reference")
    monkeypatch.setattr(loading, "why_missing", lambda *_: "built without CUDA kernels")


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda: torch sees no GPU here"):
        loading.load_engine("demo", device="cuda")


def test_asking_for_kernels_that_were_not_built(a_gpu_without_kernels):
    with pytest.raises(ValueError, match="built without CUDA kernels; to build"):
        loading.load_engine("demo", device="cuda")


@pytest.mark.usefixtures("a_gpu_without_kernels")
def test_auto_says_why_it_takes_no_gpu(caplog):
    caplog.set_level(logging.WARNING, "vox_serve")
    assert choose_device() == "cpu"
    assert "The GPU is not used: built without CUDA kernels" in caplog.text


@pytest.mark.usefixtures("a_gpu_without_kernels")
def test_a_forced_backend_is_taken(monkeypatch, caplog):
    monkeypatch.setenv("VOXKERN_BACKEND", "reference")
    assert choose_device() == "cuda"
    assert not caplog.text


@pytest.mark.parametrize(
    ("device", "dtype", "quantize", "precision"),
    [
        ("cpu", torch.bfloat16, "none", "float32"),
        ("cpu", torch.bfloat16, "int4", "int8"),
        ("cuda", torch.float32, "none", "float32"),
        ("cuda", torch.bfloat16, "int8", "bfloat16"),
    ],
)
def test_the_codecs_precision(device, dtype, quantize, precision):
    assert loading.codec_precision(device, dtype, quantize) == precision
