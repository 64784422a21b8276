"""More than one replica of the server, on one machine or several, with Ray Serve.

`python -m vox_serve.cluster --replicas 2`, or `serve run vox_serve.cluster:app`. Needs
`pip install 'voxkern[cluster]'`. docs/cluster.md describes it.
"""

import os
from typing import Any

# Before a replica loads torch, whose idle threads would spin otherwise (see cli.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(name)
    from vox_serve.cluster.deployment import app

    return app
