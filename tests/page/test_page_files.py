"""The page's files over HTTP: types, headers, keys; and that they need no other server."""

import html.parser
import re
import tomllib
from pathlib import Path, PurePath
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from fake_engine import FakeEngine
from vox_serve import page
from vox_serve.api import create_app
from vox_serve.config import Config, SpeechSettings
from vox_serve.provenance import SOURCE_TYPE
from vox_serve.runner import Runner
from vox_serve.setting import bound

ROOT = Path(page.__file__).parents[3]


def make_client(**settings) -> TestClient:
    config = Config(**settings)
    return TestClient(
        create_app(Runner.for_config(FakeEngine(), config), config, {}), base_url="http://localhost"
    )


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


TAGS = Tags(page.FILES["index.html"].read_text()).tags
ALL_TAGS = TAGS + Tags(page.FILES["docs.html"].read_text()).tags


@pytest.mark.parametrize("path", sorted(page.PAGE_PATHS))
def test_each_file_has_its_type_and_the_headers(path):
    client = make_client()
    answer = client.get(path)
    assert answer.status_code == 200
    suffix = Path(path).suffix or ".html"
    assert answer.headers["content-type"] == page.TYPES[suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert not any("unsafe" in rule or "http" in rule for rule in policy)
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


def test_the_page_needs_no_key_but_its_requests_do():
    client = make_client(api_key="secret")
    assert {client.get(path).status_code for path in page.PAGE_PATHS} == {200}
    assert client.get("/v1/audio/voices").status_code == 401
    assert client.post("/generate", json={"text": "hello"}).status_code == 401


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2Fapi.py", "%2e%2e/api.py"])
def test_other_files_are_not_served(name):
    assert make_client().get(f"/page/{name}").status_code == 404


def test_the_page_works_below_a_path():
    client = make_client(root_path="/tts", api_key="secret")
    assert client.get("/tts/").text == page.FILES["index.html"].read_text()
    for _, attributes in ALL_TAGS:
        for url in filter(None, (attributes.get("src"), attributes.get("href"))):
            assert urljoin("http://localhost/tts/", url).startswith("http://localhost/tts/")
    assert client.get("/tts/page/app.js").status_code == 200


def test_no_file_names_another_server():
    # A namespace and a term, which nobody loads.
    allowed = {"http://www.w3.org/2000/svg", SOURCE_TYPE}
    for name, file in page.FILES.items():
        text = file.read_text()
        found = set(
            re.findall(r"""(?:https?:)?//[\w.-]+\.[a-z]+[^\s"'`<>]*""", text, re.IGNORECASE)
        )
        assert found <= allowed, name


def test_nothing_in_the_page_needs_an_exception_of_the_policy():
    for name in ("index.html", "docs.html"):
        assert "<style" not in page.FILES[name].read_text()
    for tag, attributes in ALL_TAGS:
        assert tag != "script" or attributes["src"]
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_imports_name_files_that_exist():
    for name, file in page.FILES.items():
        for target in re.findall(
            r"""(?:from|import|URL\() ?"\./?([\w.]+\.js)\"""", file.read_text()
        ):
            assert target.lstrip("/") in page.FILES, f"{name} imports {target}"


def test_every_control_has_a_label():
    labels = {attributes.get("for") for tag, attributes in ALL_TAGS if tag == "label"}
    for tag, attributes in ALL_TAGS:
        if tag in ("input", "textarea", "select") and attributes.get("type") not in (
            "radio",  # inside their labels
            "checkbox",
        ):
            assert attributes["id"] in labels or attributes.get("aria-label")


def test_the_settings_of_the_page_are_within_the_bounds_of_the_server():
    fields = SpeechSettings.model_fields
    controls = {a["id"]: a for tag, a in TAGS if tag == "input" and a.get("id") in fields}
    assert set(controls) >= {"temperature", "top_p", "top_k", "repetition_penalty", "seed"}
    for name, attributes in controls.items():
        low, above, high = (bound(fields[name], kind) for kind in ("ge", "gt", "le"))
        assert low is None or float(attributes["min"]) >= low
        assert above is None or float(attributes["min"]) > above
        assert float(attributes["max"]) <= high
        if attributes["type"] == "range":  # the thumb is at the server's usual default
            assert float(attributes["value"]) == fields[name].default


def test_the_files_are_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["vox_serve"]
    for name in page.FILES:
        assert any(PurePath("page", name).match(pattern) for pattern in patterns), name
