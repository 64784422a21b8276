"""Hand-written kernels for serving CSM text-to-speech. The API is `voxkern.ops`."""

import torch

from voxkern import backend, ops  # noqa: F401  (backend loads the extension, ops declares)


def num_threads() -> int:
    """Number of threads that a native CPU op uses.

    `VOXKERN_NUM_THREADS` if set, else `OMP_NUM_THREADS`, else the number of processors that CPU
    affinity and the cgroup quota leave to this process.
    """
    return torch.ops.voxkern.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of native CPU ops, 1 to 1024.

    Raises:
        RuntimeError: `n` is out of range.
    """
    torch.ops.voxkern.set_num_threads(n)
