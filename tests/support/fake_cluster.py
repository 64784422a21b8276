"""The cluster's command with fake engines, which note their requests in a file that tests read."""

import os
import pickle
import sys
from dataclasses import replace
from typing import Any

from fastapi import FastAPI

from fake_engine import FakeEngine
from vox_serve.api import create_app
from vox_serve.cluster import __main__ as command
from vox_serve.cluster import replica
from vox_serve.config import Config
from vox_serve.long_form import LongForm
from vox_serve.runner import Runner

NOTES = "VOXKERN_TEST_NOTES"
"""Environment variable that names the file."""


class Notes(list):
    """Requests of an engine. All replicas append to the same file."""

    def append(self, request: Any) -> None:
        line = pickle.dumps(replace(request, feed=None))
        with open(os.environ[NOTES], "ab", buffering=0) as file:  # one write: nothing is mixed up
            file.write(line)


class FakeReplica(replica.Replica):
    """A replica with a `FakeEngine`. It speaks in parts if `--split_chars` is given."""

    def load(self, config: Config) -> tuple[Runner, FastAPI, str]:
        engine: Any = FakeEngine()
        engine.requests = Notes()
        if "split_chars" in config.model_fields_set:
            engine = LongForm(engine, config.split_chars)
        runner = Runner.for_config(engine, config)
        return runner, create_app(runner, config, {}), "fake"


def main() -> None:
    replica.Replica = FakeReplica  # type: ignore[misc]
    sys.exit(command.main())
