"""Stream speech with the package requests, and try again later when the server is busy.

python examples/stream_requests.py "Hello there." hello.wav [http://localhost:8000]
"""

import sys
import time

import requests

ATTEMPTS = 5


def speak(text: str, server: str) -> requests.Response:
    """The response to a streamed request, whose audio is not read yet.

    Raises:
        requests.HTTPError: the server refuses the request, or is busy for too long.
    """
    for attempt in range(1, ATTEMPTS + 1):
        body = {"text": text, "streaming": True}
        response = requests.post(f"{server}/generate", json=body, stream=True, timeout=(5, 60))
        if response.status_code not in (429, 503) or attempt == ATTEMPTS:
            break
        wait_s = int(response.headers.get("Retry-After", "1"))
        print(f"busy: trying again in {wait_s} s")
        time.sleep(wait_s)
    if not response.ok:
        print(response.json()["detail"], file=sys.stderr)
    response.raise_for_status()
    return response


def main(text: str, path: str, server: str = "http://localhost:8000") -> None:
    with speak(text, server) as response, open(path, "wb") as file:
        num_bytes = 0
        for chunk in response.iter_content(chunk_size=None):  # as it arrives
            file.write(chunk)
            num_bytes += len(chunk)
    print(f"{path}: {num_bytes} bytes, request {response.headers['X-Request-Id']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
