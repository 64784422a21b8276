"""Reads the start of a file on the hub without downloading the rest."""

import io

CHUNK_BYTES = 1 << 20
"""Bytes of one request. Headers of CSM checkpoints have 0.02 to 8 MB."""

TIMEOUT_S = 30.0


class RemoteFile(io.RawIOBase):
    """A file on the hub, read from its start by range requests.

    Args:
        repo: the repository's id.
        name: the file's name.

    Raises:
        OSError: (from `read`) a request failed.
    """

    def __init__(self, repo: str, name: str):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self._url = hf_hub_url(repo, name)
        self._headers = build_hf_headers()
        self._position = 0
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, fewer only at the file's end."""
        parts = [self._waiting[:size]]
        self._waiting = self._waiting[size:]
        missing = size - len(parts[0])
        if missing > 0:
            data = self._request(max(missing, CHUNK_BYTES))
            parts.append(data[:missing])
            self._waiting = data[missing:]
        return b"".join(parts)

    def _request(self, count: int) -> bytes:
        try:
            return self._received(count)
        except Exception as error:  # the HTTP library, and so its errors, depends on the version
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"{self._url} cannot be read: {reason}") from None

    def _received(self, count: int) -> bytes:
        from huggingface_hub import get_session

        end = self._position + count
        headers = self._headers | {"Range": f"bytes={self._position}-{end - 1}"}
        data = bytearray()
        with get_session().stream(
            "GET", self._url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
        ) as response:
            if response.status_code == 416:  # the file ends here
                return b""
            response.raise_for_status()
            skipped = 0 if response.status_code == 206 else self._position  # not a part: all of it
            for part in response.iter_bytes():
                data += part
                if len(data) >= skipped + count:
                    break
        found = bytes(data[skipped : skipped + count])
        self._position += len(found)
        return found
