"""The SIMT emulator detects the classes of bugs that simt.h lists."""

import os
import re
import subprocess

import pytest

from ops_testing import SIMT_LIBRARY

PLANTED = SIMT_LIBRARY.with_name("simt_planted")
pytestmark = pytest.mark.skipif(not PLANTED.exists(), reason="not built: make simt")

ORDERS = ("random", "ascending", "descending")


def run(name: str, order: str) -> str:
    # The ASan settings of the test process do not apply to this one.
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    result = subprocess.run(
        [PLANTED, name],
        env=environment | {"VOXKERN_SIMT_ORDER": order},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name",
    [
        *(
            "sum",
            "first threads",
            "neighbour",
            "warp",
            "copy",
            "grid",
            "product",
            "overlap",
            "overlap that lasts",
        ),
        *("overlap after a late start", "phases", "phases that lack a block"),
    ],
)
def test_a_sound_kernel_is_right(name, order):
    assert run(name, order) == "right\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent barrier", "threads meet at different barriers: .*planted.cpp:.*planted.cpp:"),
        ("left before a barrier", r"__syncthreads .*, but .* thread \(50, 0, 0\) has ended"),
        ("first threads that lack one", "threads meet at different barriers: .*planted.cpp:"),
        ("missing lane", "__shfl_sync .* with mask 0xffffffff, but .* has ended"),
        ("mask without its caller", "__any_sync .*: the mask lacks its caller"),
        ("outside the mask", "__shfl_sync .*: reads a lane outside the mask"),
        ("mixed operations", "lanes meet in different operations: .*__a(ny|ll)_sync"),
        ("shared overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("static overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned", "runtime error: store to misaligned address"),
        ("grid that is not resident", "threads wait for ever"),
        ("unwritten", "wrong"),
        ("overlap that reads", "wrong"),
        ("overlap without a late start", "wrong"),
        ("overlap that never waits", "overlaps the previous launch, but does not wait for it"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_planted_bug_is_found(name, message, order):
    output = run(name, order)
    assert re.search(message, output, re.DOTALL), output


@pytest.mark.parametrize(
    ("name", "orders"),
    [
        ("neighbour without barrier", ORDERS),
        ("overwrite without barrier", ORDERS),
        ("late overwrite without barrier", ("random",)),
        ("warp without syncwarp", ORDERS),
        ("copy without wait", ("random", "descending")),
    ],
)
def test_a_race_changes_the_result(name, orders):
    for order in orders:
        assert run(name, order) == "wrong\n", order


def test_a_wrong_order_is_named():
    message = "VOXKERN_SIMT_ORDER=sideways: expected random, ascending or descending"
    assert message in run("sum", "sideways")
