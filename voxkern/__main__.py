"""`python -m voxkern`: the backends of this machine, which one serves each op, and why."""

import importlib.metadata
import importlib.util
import os
import platform
from collections import Counter

import torch

from voxkern import num_threads
from voxkern.backend import BACKENDS, OPS, backend_for, why_missing
from voxkern.console import quiet_on_closed_pipe


def machine() -> dict[str, str]:
    """Versions, devices and settings of this machine, by name."""
    native = why_missing("native", "cpu")
    facts = {"Python": platform.python_version(), "torch": torch.__version__}
    if native is None:
        isa = torch.ops.voxkern.cpu_isa()
        facts["CPU kernels"] = f"{isa}, {num_threads()} threads"
    else:
        facts["CPU kernels"] = f"none: {native}"
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["CUDA"] = f"{torch.version.cuda}, capability {torch.cuda.get_device_capability()}"
    elif torch.version.cuda:
        facts["GPU"] = f"none that torch's CUDA {torch.version.cuda} can use"
    else:
        facts["GPU"] = "none: this torch was built without CUDA"
    if importlib.util.find_spec("triton"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        version = importlib.metadata.version("triton")
        facts["Triton"] = version + (", interpreted" if interpreted else "")
    else:
        facts["Triton"] = "none (pip install triton)"
    for name, value in sorted(os.environ.items()):
        if name.startswith("VOXKERN_"):
            facts[name] = value
    return facts


def device_report(device: str) -> list[str]:
    """Lines about one device: its backends, and the backend that serves each op."""
    lines = [f"  {b:18} {why_missing(b, device) or 'yes'}" for b in BACKENDS]
    try:
        served = {op: backend_for(device, op) for op in OPS}
    except RuntimeError as error:
        return [*lines, f"  no op runs: {error}"]
    counts = Counter(served.values())
    lines.append(f"  {len(OPS)} ops: " + ", ".join(f"{n} by {b}" for b, n in counts.items()))
    for op, backend in served.items():
        # Reasons why no preferred backend of this device serves the op.
        preferred = [b for b in BACKENDS[: BACKENDS.index(backend)] if not why_missing(b, device)]
        reasons = "; ".join(filter(None, (why_missing(b, device, op) for b in preferred)))
        lines.append(f"    {op:18} {backend:10} {reasons}".rstrip())
    return lines


@quiet_on_closed_pipe()
def main() -> None:
    for name, value in machine().items():
        print(f"{name:20} {value}")
    for device, is_present in (("cpu", True), ("cuda", torch.cuda.is_available())):
        print(
            f"\n{device}" + ("" if is_present else " (not on this machine)"),
            *device_report(device),
            sep="\n",
        )


if __name__ == "__main__":
    main()
