"""More than one replica of the server, on one machine or several, with Ray Serve.

`python -m vox_serve.cluster --replicas 2`, or `serve run vox_serve.cluster:app`. Needs
`pip install 'voxkern[cluster]'`. docs/cluster.md describes it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(name)
    from vox_serve.cluster.deployment import app

    return app
