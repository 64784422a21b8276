import gc
import os
from pathlib import Path

# The workers of pytest-xdist share the cores: one thread each, in processes that they start too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("VOXKERN_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Python's garbage collector would go through all modules and tests, again and again.
gc.disable()

import pytest
import torch

# Failed asserts of support code show their values, as those of tests do. Must precede the imports.
SUPPORT = Path(__file__).parent / "tests" / "support"
pytest.register_assert_rewrite(*(path.stem for path in SUPPORT.glob("[a-z]*")))

from ops_testing import ALL_TARGETS, end_if_gpu_is_broken, targets
from vox_serve import loading
from voxkern.backend import OPS

pytest_plugins = ["through_door", "through_cluster"]


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--door", action="store_true", help="run the tests of HTTP through a cluster's door"
    )
    parser.addoption(
        "--cluster",
        action="store_true",
        help="run the tests of HTTP against a cluster of two with real Ray",
    )
    parser.addoption(
        "--url",
        help="of a server that runs already, such as a cluster, for tests/fuzz/test_openapi.py",
    )


def pytest_report_header() -> list[str]:
    lines = [f"op tests on {target}: {target.why_missing() or 'yes'}" for target in ALL_TARGETS]
    return [f"CPU instruction set: {torch.ops.voxkern.cpu_isa()}", *lines]


def pytest_generate_tests(metafunc) -> None:
    """Parametrize `target` (a backend on a device): op tests run on each that has the op here."""
    if "target" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".test_")[2]
        metafunc.parametrize("target", targets(op if op in OPS else None), ids=str)


def pytest_collection_modifyitems(items) -> None:
    """The longest tests first: at the end, one worker would wait for the others."""
    longest = ("compiles_for_hopper", "test_every_command_runs", "test_atheris")
    items.sort(key=lambda item: not any(name in item.name for name in longest))


def pytest_collection_finish() -> None:  # not in the process that only hands tests to workers
    gc.freeze()
    gc.enable()


# With tensors this small, more torch threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    # torch.manual_seed also keeps a traceback for each kind of device that is not there.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _gpu_works_afterwards(request):
    yield
    end_if_gpu_is_broken(request.node.nodeid)


@pytest.fixture(scope="session", autouse=True)
def _auto_is_cpu():
    """`auto` means the CPU on every machine: a test that wants another device names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "choose_device", lambda: "cpu")
        yield
