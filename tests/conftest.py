import pytest
import torch

from ops_testing import ALL_TARGETS, Target, targets


def pytest_report_header() -> list[str]:
    lines = [f"op tests on {target}: {target.why_missing() or 'yes'}" for target in ALL_TARGETS]
    return [f"CPU instruction set: {torch.ops.voxkern.cpu_isa()}", *lines]


@pytest.fixture(params=targets(), ids=str)
def target(request) -> Target:
    """A backend on a device: every op test runs on each that is here."""
    return request.param


# The tensors are tiny: torch's threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
