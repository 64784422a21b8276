"""Requests to the server in each encoding, and a check of its refusals."""

import json

import pytest


def as_json(client, values):
    return client.post("/generate", json=values)


def as_urlencoded(client, values):
    return client.post("/generate", data=values)


def as_multipart(client, values):
    return client.post("/generate", files={name: (None, str(v)) for name, v in values.items()})


SENDERS = pytest.mark.parametrize("send", [as_json, as_urlencoded, as_multipart])
OVERRIDES = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "repetition_window": 3,
    "seed": 2**63 - 1,
}
SPOKEN = [
    "a|b | c",
    "<|begin_of_text|><|AUDIO|>[1]hi<|end_of_text|>",
    "nul \0 bell \a escape \x1b[31m",
    "\0",
    "Grüße, 你好, שלום, 👩‍👩‍👧",
    "  spaces kept\t\n",
    "\u202e\u200b.\ufeff",
    "a&b=c%20+d",
]


def assert_refused(answer, status_code: int, says: str = "") -> None:
    assert answer.status_code == status_code, answer.text
    assert answer.headers["content-type"] == "application/json"

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    detail = json.loads(answer.content, parse_constant=no_constant)["detail"]
    assert detail
    assert says in json.dumps(detail)
    assert len(answer.content) < 2000
