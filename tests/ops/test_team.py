"""The native CPU ops' thread team, and the environment variables that configure it."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import voxkern
from forked_python import python
from ops_testing import Target
from voxkern import ops

pytestmark = pytest.mark.skipif(
    Target("native", "cpu").why_missing() is not None, reason="the extension is not built"
)


@pytest.fixture(autouse=True)
def _same_threads_after():
    before = voxkern.num_threads()
    yield
    voxkern.set_num_threads(before)


def attention() -> torch.Tensor:
    """Runs an op with a barrier, large enough for a team; the result is always the same."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 64, generator=generator)
    k_pages, v_pages = torch.randn(2, 60, 2, 16, 64, generator=generator)
    page_table = torch.arange(60, dtype=torch.int32).view(3, 20)
    seq_lens = torch.tensor([320, 300, 17], dtype=torch.int32)
    return ops.decode_attention(q, k_pages, v_pages, page_table, seq_lens, 0.125)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "VOXKERN_NUM_THREADS"}
    return subprocess.run(
        [*python(), "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_resizing_under_callers_of_several_threads():
    expected = attention()
    wrong = []

    def call():
        for _ in range(200):
            if not torch.equal(attention(), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    for caller in callers:
        caller.start()
    for n in (1, 2, 3, 7) * 10:
        voxkern.set_num_threads(n)
        assert torch.equal(attention(), expected)
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert not wrong


def test_a_forked_child_starts_a_team_of_its_own():
    voxkern.set_num_threads(3)
    expected = attention()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for threads it does not have
        same = torch.equal(attention(), expected)
        voxkern.set_num_threads(2)
        os._exit(0 if same and torch.equal(attention(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(attention(), expected)


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_absurd_numbers_of_threads_are_refused(n):
    with pytest.raises(RuntimeError, match=f"n: expected 1 to 1024 threads, got {n}"):
        voxkern.set_num_threads(n)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_threads_that_cannot_start_are_an_error():
    result = run_python(
        "import resource, torch, voxkern\n"
        "from voxkern import ops\n"
        "x, weight = torch.randn(64, 512), torch.randn(512, 512)\n"
        "expected = ops.linear(x, weight)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (256 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "voxkern.set_num_threads(1000)\n"
        "try:\n"
        "    ops.linear(x, weight)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "voxkern.set_num_threads(2)\n"
        "print(torch.equal(ops.linear(x, weight), expected))\n"
    )
    assert result.returncode == 0, result.stderr
    error, after = result.stdout.splitlines()
    assert error.startswith("could not start thread ")
    assert " of 1000: " in error
    assert after == "True"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VOXKERN_NUM_THREADS", "two", "VOXKERN_NUM_THREADS=two: expected 1 to 1024"),
        ("VOXKERN_NUM_THREADS", "0", "VOXKERN_NUM_THREADS=0: expected 1 to 1024"),
        ("VOXKERN_PIN", "yes", "VOXKERN_PIN=yes: expected 0 or 1"),
        ("VOXKERN_ISA", "sse9", "VOXKERN_ISA=sse9: expected baseline, avx2 or avx512"),
        ("VOXKERN_LIBRARY", "/no/such.so", "VOXKERN_LIBRARY=/no/such.so: there is no such file"),
    ],
)
def test_a_wrong_environment_variable_is_named(variable, value, message):
    code = "import torch; from voxkern import ops; ops.linear(*torch.zeros(2, 512, 512))"
    result = run_python(code, **{"OMP_NUM_THREADS": "2", variable: value})
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1,
    reason="every thread stays on one processor anyway",
)
@pytest.mark.parametrize(("pin", "pinned"), [("0", 0), ("1", 3)])
def test_pinned_workers_stay_on_one_processor_each(pin, pinned):
    code = (
        "import os, torch\n"
        "from voxkern import ops\n"
        "allowed = os.sched_getaffinity(0)\n"
        "ops.linear(*torch.zeros(2, 512, 512))\n"
        "assert os.sched_getaffinity(0) == allowed, 'the caller is left alone'\n"
        "tasks = map(int, os.listdir('/proc/self/task'))\n"
        "print(sum(len(os.sched_getaffinity(task)) == 1 for task in tasks))\n"
    )
    result = run_python(code, VOXKERN_PIN=pin, VOXKERN_NUM_THREADS="4")
    assert result.stdout.split() == [str(pinned)], result.stderr


CGROUPS = {
    "none": ({}, 0),
    "version 2": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "version 2, a group around it has less": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
        1.5,
    ),
    "version 2, a container that sees the host's path": (
        {"proc/self/cgroup": "0::/../x/y\n", "sys/fs/cgroup/cpu.max": "30000 20000\n"},
        1.5,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "3:memory:/a\n2:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "2:cpu:/a\n0::/\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_limits_of_cgroups_are_found(name, tmp_path):
    files, expected = CGROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert torch.ops.voxkern.cpu_quota(str(tmp_path)) == expected


def test_the_environment_is_heeded():
    code = "import torch, voxkern; print(voxkern.num_threads(), torch.ops.voxkern.cpu_isa())"
    result = run_python(code, VOXKERN_NUM_THREADS="5", OMP_NUM_THREADS="2", VOXKERN_ISA="baseline")
    assert result.stdout.split() == ["5", "baseline"], result.stderr
