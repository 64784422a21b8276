"""schemathesis against /openapi.json: generated requests, valid and not, and checked answers."""

import pytest

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (extra: fuzz)"
)

from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis.generation import GenerationMode

from fake_engine import FakeEngine
from live_server import LiveServer
from vox_serve.formats import FORMATS

EXAMPLES = 100
"""Requests of each operation and mode; hypothesis chooses the same ones in every run."""
INTEGERS = ("speaker", "top_k", "repetition_window", "seed", "max_frames", "sample_rate")
CASES = [
    ("POST", "/generate", GenerationMode.POSITIVE),
    ("POST", "/generate", GenerationMode.NEGATIVE),
    ("POST", "/v1/audio/speech", GenerationMode.POSITIVE),
    ("POST", "/v1/audio/speech", GenerationMode.NEGATIVE),
    ("GET", "/v1/models", GenerationMode.POSITIVE),
    ("GET", "/v1/models/{name}", GenerationMode.POSITIVE),
    ("GET", "/v1/audio/models", GenerationMode.POSITIVE),
    ("POST", "/v1/audio/voices", GenerationMode.NEGATIVE),
    ("GET", "/v1/audio/voices", GenerationMode.POSITIVE),
    ("GET", "/v1/audio/voices/{name}", GenerationMode.POSITIVE),
    ("GET", "/v1/audio/voices/{name}/sample", GenerationMode.POSITIVE),
    ("DELETE", "/v1/audio/voices/{name}", GenerationMode.POSITIVE),
    ("POST", "/v1/conversations", GenerationMode.POSITIVE),
    ("POST", "/v1/conversations/{key}/turns", GenerationMode.NEGATIVE),
    ("GET", "/v1/conversations/{key}", GenerationMode.POSITIVE),
    ("POST", "/v1/conversations/{key}/interrupt", GenerationMode.POSITIVE),
    ("POST", "/v1/conversations/{key}/interrupt", GenerationMode.NEGATIVE),
    ("DELETE", "/v1/conversations/{key}", GenerationMode.POSITIVE),
    ("GET", "/health", GenerationMode.POSITIVE),
    ("GET", "/health/live", GenerationMode.POSITIVE),
    ("GET", "/health/ready", GenerationMode.POSITIVE),
    ("GET", "/metrics", GenerationMode.POSITIVE),
]


@pytest.fixture(scope="module")
def schema(request):
    if url := request.config.getoption("--url"):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        return
    with LiveServer(FakeEngine(num_frames=1)) as server:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def test_every_operation_has_a_case(schema):
    found = {found.ok().label for found in schema.get_all_operations()}
    assert found == {f"{method} {path}" for method, path, _ in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_documented(schema, method, path, mode):
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if method == "POST" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        # JSON Schema takes 1.0 for an integer; the server does not.
        fields = case.body if isinstance(case.body, dict) else {}
        assume(not any(isinstance(fields.get(name), float) for name in INTEGERS))
        # A voice must agree with the speaker, and with the conversation's voice.
        contradicts = "voice" in fields and fields.keys() & {"speaker", "conversation"}
        assume(mode is GenerationMode.NEGATIVE or not contradicts)
        # A format decides which sample rates there are, and a flag has one of its two names.
        if mode is GenerationMode.POSITIVE:
            default = "mp3" if path == "/v1/audio/speech" else "wav"
            name = fields.get("format") or fields.get("response_format") or default
            if fields.get("sample_rate") not in (None, *FORMATS[name].rates_hz):
                del fields["sample_rate"]
            if "stream" in fields:
                fields.pop("streaming", None)
        # The model's sizes decide which codes and recordings are valid.
        assume(mode is GenerationMode.NEGATIVE or not fields.keys() & {"context", "audio"})
        # An empty field of a form counts as not given, and so does a list without entries; and the
        # text 0 or 1 is a boolean.
        assume("" not in fields.values())
        if case.media_type == "multipart/form-data":
            flags = [fields.get("stream"), fields.get("streaming")]
            assume([] not in fields.values() and int not in map(type, flags))
        # schemathesis compares with bounds in float64, which cannot tell 2**63 from 2**63 + 1000.
        seed = fields.get("seed")
        assume(not isinstance(seed, int) or abs(seed) < 2**63 - 2048)
        case.call_and_validate()

    check()
