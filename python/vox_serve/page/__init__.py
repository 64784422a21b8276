"""The page at / and the API's description at /docs: their files, and the routes that serve them.

The files need no build step and load nothing from other servers. All their URLs are relative, so
the page also works below a path of a proxy. They need no API key: the user types one into the page,
which sends it with its requests.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Media type by suffix. Other files of this folder are not served."""

FILES = {file.name: file for file in Path(__file__).parent.iterdir() if file.suffix in TYPES}

PAGE_PATHS = frozenset({"/", "/docs", "/redoc", *(f"/page/{name}" for name in FILES)})
"""Paths that need no API key."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "media-src blob: 'self'",
        "img-src 'self' data:",
        "worker-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS = {
    # A browser asks each time whether its copy is still valid, so an updated server shows at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Add the page and its files to an app."""
    contents = {name: file.read_bytes() for name, file in FILES.items()}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in contents.items()}

    def answer(name: str, request: Request) -> Response:
        headers = {**HEADERS, "ETag": tags[name]}
        known = request.headers.get("if-none-match", "")
        if tags[name] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(contents[name], media_type=TYPES[FILES[name].suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer("index.html", request)

    @app.get("/docs", include_in_schema=False)
    @app.get("/redoc", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return answer("docs.html", request)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return answer(name, request)
