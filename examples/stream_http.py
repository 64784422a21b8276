"""Stream speech from a server into a WAV file, and print when the first audio arrived.

python examples/stream_http.py "Hello there." hello.wav [http://localhost:8000]
"""

import json
import sys
import time
import urllib.request

WAV_HEADER_BYTES = 44


def main(text: str, path: str, server: str = "http://localhost:8000") -> None:
    request = urllib.request.Request(
        f"{server}/generate",
        data=json.dumps({"text": text, "streaming": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    received = 0
    with urllib.request.urlopen(request) as response, open(path, "wb") as file:
        while chunk := response.read1():
            if received <= WAV_HEADER_BYTES < received + len(chunk):
                print(f"first audio after {(time.perf_counter() - started) * 1000:.0f} ms")
            received += len(chunk)
            file.write(chunk)
    print(f"{path}: {received} bytes after {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
