"""Runs the tests of the HTTP interface against a cluster of two with real Ray: `pytest --cluster`.

Each replica has a fake engine. A test runs if its engine is `FakeEngine()` and its settings are
those of `CLUSTERS`, of which each is started once; the other tests are skipped with the reason, and
run through the door alone (`--door`). An engine's `requests` are those of both replicas.
"""

import contextlib
import itertools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.testclient import httpx

from cluster_process import ClusterProcess
from fake_cluster import NOTES
from fake_engine import TIMEOUT_S, FakeEngine
from live_server import LiveServer
from vox_serve.config import Config
from vox_serve.long_form import LongForm
from vox_serve.runner import Runner

CLUSTERS = ({}, {"split_chars": 24})
"""Settings of the clusters that tests may use."""

COMMAND = ("-c", "import fake_cluster; fake_cluster.main()")
ENGINE = ("num_frames", "max_batch_size", "step_s", "prepare_s", "fail_at_step")
IGNORED = {"log_level", "drain_s"}


class Noted(Sequence):
    """The requests that both replicas got since this was made."""

    def __init__(self, path: Path):
        self._path = path
        self._start = path.stat().st_size

    def _read(self) -> list:
        found = []
        with self._path.open("rb") as file, contextlib.suppress(EOFError):
            file.seek(self._start)
            while True:
                found.append(pickle.load(file))
        return found

    def __len__(self) -> int:
        return len(self._read())

    def __getitem__(self, index):
        return self._read()[index]


class Remote(FakeEngine):
    """A test's view of the replicas' engines: it sees `requests` and nothing else."""

    def __getattribute__(self, name: str):
        if name not in ("requests", "__class__", "__dict__"):
            pytest.skip(f"looks at the engine's {name}: through the door alone")
        return object.__getattribute__(self, name)


class Clusters:
    """Clusters of two, started when a test needs them.

    Args:
        folder: of their files.
    """

    def __init__(self, folder: Path):
        self.notes = folder / "notes"
        self.notes.touch()
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._started: dict[str, ClusterProcess] = {}

    def close(self) -> None:
        self._stack.close()

    def port(self, engine, config) -> int:
        """The port of the cluster that does what a test's server would do; skips the test if
        there is none. The engine becomes a `Remote`."""
        settings = {name: getattr(config, name) for name in config.model_fields_set - IGNORED}
        if settings not in CLUSTERS:
            pytest.skip(f"needs its own settings, {', '.join(settings)}: through the door alone")
        fake = engine.engine if isinstance(engine, LongForm) else engine
        usual = [getattr(FakeEngine(), name) for name in ENGINE]
        if type(fake) is not FakeEngine or [getattr(fake, name) for name in ENGINE] != usual:
            pytest.skip("needs an engine of its own: through the door alone")
        voices = self._folder / "voices"
        for voice in voices.glob("*"):
            voice.unlink()
        name = str(settings)
        if name not in self._started:
            flags = [f"--{key}={value}" for key, value in settings.items()]
            flags += ["--replicas", "2", "--num_threads", "1", "--voices", str(voices)]
            cluster = ClusterProcess(*flags, command=COMMAND)
            self._started[name] = self._stack.enter_context(cluster)
        fake.requests = Noted(self.notes)
        fake.__class__ = Remote
        return self._started[name].port


class Nothing:
    """The application of a client that sends its requests elsewhere."""

    async def __call__(self, scope, receive, send) -> None:
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    def __getattr__(self, name: str):
        if name not in ("get", "state", "statuses"):
            raise AttributeError(name)
        pytest.skip(f"looks at the application's {name}: through the door alone")


class Transport(httpx.HTTPTransport):
    """Ends an answer that is cut where it is cut, as a `TestClient` does."""

    def handle_request(self, request):
        answer = super().handle_request(request)
        answer.stream = UntilCut(answer.stream)
        return answer


class UntilCut(httpx.SyncByteStream):
    """The bytes of an answer that came."""

    def __init__(self, inner: httpx.SyncByteStream):
        self._inner = inner
        self.close = inner.close

    def __iter__(self) -> Iterator[bytes]:
        with contextlib.suppress(httpx.RemoteProtocolError):
            yield from self._inner


def _missing(self, name: str):
    pytest.skip(f"looks at the server's {name}: through the door alone")


@pytest.fixture(scope="session", autouse=True)
def _cluster(request, tmp_path_factory) -> Iterator[None]:
    """Patches the two ways in which tests start a server."""
    if not request.config.getoption("--cluster"):
        yield
        return
    pytest.importorskip("ray", reason="needs Ray: pip install 'voxkern[cluster]'")
    clusters = Clusters(tmp_path_factory.mktemp("clusters"))
    addresses = (f"127.0.{n // 250}.{n % 250 + 2}" for n in itertools.count())
    init, for_config = TestClient.__init__, Runner.for_config

    def noted(engine, config) -> Runner:
        runner = for_config(engine, config)
        runner.made_of = engine, config
        return runner

    def init_client(self, app, *args, **kwargs) -> None:
        if not isinstance(app, FastAPI):
            init(self, app, *args, **kwargs)
            return
        if (made_of := getattr(app.state.voices._runner, "made_of", None)) is None:
            pytest.skip("makes its own runner: through the door alone")
        port = clusters.port(*made_of)
        init(self, Nothing(), *args, **kwargs)
        self.base_url, self.timeout = f"http://127.0.0.1:{port}", TIMEOUT_S
        # Conversations belong to a client, so each test's server has a client of its own.
        self._transport = Transport(local_address=next(addresses))

    def init_server(self, engine, **settings) -> None:
        self.port = clusters.port(engine, Config(**settings))

    with pytest.MonkeyPatch.context() as patch, contextlib.closing(clusters):
        patch.setenv(NOTES, str(clusters.notes))
        patch.setattr(Runner, "for_config", staticmethod(noted))
        patch.setattr(TestClient, "__init__", init_client)
        patch.setattr(LiveServer, "__init__", init_server)
        patch.setattr(LiveServer, "__enter__", lambda self: self)
        patch.setattr(LiveServer, "__exit__", lambda self, *_: None)
        patch.setattr(LiveServer, "stop", lambda self: None)
        patch.setattr(LiveServer, "__getattr__", _missing, raising=False)
        yield
