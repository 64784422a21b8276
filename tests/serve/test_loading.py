"""The choice of device, batch size and codec precision when a model is loaded."""

import logging

import pytest
import torch

from checkpoints import build_tiny
from vox_serve import loading
from vox_serve.fifo import choose_all
from vox_serve.kv_cache import KvCache
from vox_serve.loading import load_engine
from vox_serve.policy import choose_step
from voxkern import backend

# conftest.py replaces it.
choose_device = loading.choose_device


@pytest.fixture
def a_gpu(monkeypatch):
    """`a_gpu(*backends)` pretends that torch sees a GPU on which these backends run."""
    reasons = {"native": "built without CUDA kernels", "triton": "Triton is not installed"}

    def with_backends(*present: str) -> None:
        def why_missing(backend: str, device: str, op: str | None = None) -> str | None:
            assert device == "cuda"
            return None if backend in (*present, "reference") else reasons[backend]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(backend, "why_missing", why_missing)
        monkeypatch.setattr(loading, "why_missing", why_missing)

    backend._resolved.cache_clear()
    before = backend.forced()
    backend.force(None)
    yield with_backends
    backend.force(before)
    backend._resolved.cache_clear()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda: torch sees no GPU here"):
        loading.load_engine("demo", device="cuda")


@pytest.mark.parametrize("present", [("native",), ("triton",), ("native", "triton")])
def test_either_backend_is_enough_for_a_gpu(a_gpu, present, caplog):
    """On a machine without nvcc, `pip install -e .` leaves Triton as the only GPU backend."""
    a_gpu(*present)
    assert choose_device() == "cuda"
    assert backend.backend_for("cuda") == present[0]
    assert not caplog.text


def test_a_requested_gpu_without_kernels_is_an_error(a_gpu):
    a_gpu()
    said = r"built without CUDA kernels; Triton is not installed; .* install nvcc and run VOXKERN"
    with pytest.raises(ValueError, match=f"device cuda: {said}"):
        loading.load_engine("demo", device="cuda")


def test_auto_logs_why_it_uses_no_gpu(a_gpu, caplog):
    caplog.set_level(logging.WARNING, "vox_serve")
    a_gpu()
    assert choose_device() == "cpu"
    assert "The GPU is not used: built without CUDA kernels; Triton" in caplog.text


@pytest.mark.parametrize(("name", "device"), [("reference", "cuda"), ("native", "cpu")])
def test_a_forced_backend_decides(a_gpu, name, device, caplog):
    a_gpu("triton")
    backend.force(name)
    assert choose_device() == device
    assert ("backend native: built without CUDA kernels" in caplog.text) == (device == "cpu")


@pytest.mark.parametrize(("memory", "expected"), [(80 * 2**30, 64), (4 * 2**30, 32), (2**20, 1)])
def test_half_of_the_memory_is_for_keys_and_values(memory, expected):
    assert loading.choose_batch_size(loading.GPU_ROWS, 2**26, memory) == expected


@pytest.mark.parametrize(
    ("choose", "sequences", "expected"),
    [(choose_step, 10**6, 32), (choose_all, 10**6, 8), (choose_step, 8, 4), (choose_step, 3, 1)],
)
def test_the_default_batch_size(monkeypatch, tmp_path, choose, sequences, expected):
    monkeypatch.setattr(KvCache, "sequence_bytes", lambda config, dtype: 2**20)
    monkeypatch.setattr(loading, "memory_bytes", lambda: sequences * 2**20)
    folder = build_tiny().write(tmp_path)
    assert load_engine(str(folder), choose=choose).max_batch_size == expected


@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_gpus_weights_do_not_depend_on_the_backend(a_gpu, monkeypatch, dtype, quantize):
    """Weights, packed or not, and the codec go to the device in the model's dtype."""
    a_gpu("triton")
    asked = []

    def load_checkpoint(folder, dtype, device, allow_pickle, quantize, caches, adapter):
        asked.append((dtype, device.type, quantize))

    def load_codec(checkpoint, codec, precision):
        asked.append(precision)
        raise InterruptedError

    monkeypatch.setattr(loading, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(loading, "load_codec", load_codec)
    with pytest.raises(InterruptedError):
        loading.load_engine("demo", device="cuda", dtype=dtype, quantize=quantize)
    name = "bfloat16" if dtype == "auto" else dtype
    assert asked == [(getattr(torch, name), "cuda", quantize), name]


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
