"""Hand-written kernels for serving CSM text-to-speech. The API is `voxkern.ops`."""

import torch

from voxkern import backend, ops  # noqa: F401  (backend loads the extension, ops declares)


def num_threads() -> int:
    """Threads that a native CPU op uses.

    `VOXKERN_NUM_THREADS`, else `OMP_NUM_THREADS`, else the processors that affinity and cgroup
    leave to this process.
    """
    return torch.ops.voxkern.num_threads()


def set_num_threads(n: int) -> None:
    """Let native CPU ops use `n` threads, 1 to 1024.

    Raises:
        RuntimeError: `n` is out of range.
    """
    torch.ops.voxkern.set_num_threads(n)
