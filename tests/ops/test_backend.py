"""The choice of the backend for an op, and the reason given for a missing one."""

import os
import subprocess
import sys

import pytest
import torch

from forked_python import python
from voxkern import backend
from voxkern.backend import OPS, backend_for, why_missing


@pytest.fixture
def force():
    before = backend.forced()
    yield backend.force
    backend.force(before)


def test_every_op_has_a_reference():
    for op in OPS:
        assert callable(backend.implementation(op, "reference"))


def test_a_forced_backend_serves(force):
    force("reference")
    assert {backend_for("cpu", op) for op in OPS} == {"reference"}
    assert force(None) == "reference"
    assert backend_for("cpu", OPS[0]) == "native"


@pytest.mark.slow
def test_the_variable_forces_a_backend_from_the_start():
    code = "from voxkern.backend import OPS, backend_for; print(backend_for('cpu', OPS[0]))"
    result = subprocess.run(
        [*python(), "-c", code],
        env={**os.environ, "VOXKERN_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "reference\n"


def test_without_its_files_triton_serves_nothing(force, monkeypatch, tmp_path):
    """A folder that holds only old bytecode is not a backend."""
    (tmp_path / "triton" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr("voxkern.__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "voxkern.triton", raising=False)
    why_missing.cache_clear()
    assert why_missing("triton", "cuda") == "this version has no Triton kernels"
    why_missing.cache_clear()


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("opencl", "cpu", "there is no such backend: choose one of native, triton, reference"),
        ("native", "xpu", "the extension was built without XPU kernels"),
    ],
)
def test_forcing_a_missing_backend_says_why(force, name, device, reason):
    force(name)
    with pytest.raises(RuntimeError, match=f"backend {name}: {reason}"):
        backend_for(device, OPS[0])


needs_triton = pytest.mark.skipif(
    why_missing("triton", "cuda") is not None, reason="Triton, or voxkern/triton, is not here"
)


@needs_triton
def test_triton_needs_its_interpreter_for_cpu_tensors(force, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why_missing.cache_clear()
    force("triton")
    with pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1"):
        backend_for("cpu", OPS[0])
    why_missing.cache_clear()


@needs_triton
@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True)])
def test_triton_needs_a_gpu_that_it_compiles_for(monkeypatch, capability, serves):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    why_missing.cache_clear()
    reason = None if serves else "Triton needs a GPU of capability 8.0, this one has 7.5"
    assert why_missing("triton", "cuda") == reason
    why_missing.cache_clear()


@needs_triton
def test_the_interpreter_takes_no_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    why_missing.cache_clear()
    assert why_missing("triton", "cpu") is None
    assert why_missing("triton", "cuda") == "TRITON_INTERPRET=1 is for CPU tensors"
    monkeypatch.undo()
    why_missing.cache_clear()


@needs_triton
def test_triton_needs_a_c_compiler_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    why_missing.cache_clear()
    assert why_missing("triton", "cuda").startswith("Triton needs a C compiler")
    monkeypatch.setenv("CC", "icx")
    why_missing.cache_clear()
    assert why_missing("triton", "cuda") is None
    monkeypatch.undo()
    why_missing.cache_clear()


@needs_triton
def test_an_op_that_a_forced_backend_lacks_runs_its_reference(force, monkeypatch):
    monkeypatch.setattr(backend, "OPS", [*OPS, "new_op"])
    force("triton")
    assert backend_for("cuda", OPS[0]) == "triton"
    assert backend_for("cuda", "new_op") == "reference"
    assert why_missing("triton", "cuda", "new_op") == "there is no Triton kernel of new_op"


def test_an_op_that_the_extension_does_not_know_yet(monkeypatch):
    """A new op runs on its Python reference until it has a kernel."""
    monkeypatch.setattr(backend, "OPS", list(OPS))

    @backend.op
    def newest(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape)

    monkeypatch.setattr(backend, "implementation", lambda name, backend: lambda x: (name, backend))
    assert why_missing("native", "cpu", "newest") == "the extension has no CPU kernel of newest"
    assert newest(torch.ones(2)) == ("newest", "reference")


@pytest.mark.slow
def test_nothing_of_triton_is_imported_at_the_start():
    code = (
        "import sys, voxkern; voxkern.backend.backend_for('cuda'); print('triton' in sys.modules)"
    )
    result = subprocess.run([*python(), "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.slow
def test_the_table_of_this_machine():
    result = subprocess.run(
        [*python(), "-m", "voxkern"], capture_output=True, text=True, check=True
    )
    assert torch.__version__ in result.stdout
    for op in OPS:
        assert f"    {op} " in result.stdout
