"""Ogg pages (RFC 3533) of one logical stream.

ffmpeg's muxer holds each page until the next one begins, which would delay speech.
"""

import struct
from collections.abc import Sequence

MAX_PAGE_PACKETS = 40
"""Opus packets have at most 1,275 bytes, six segments; a page has at most 255."""

_SERIAL = 0x566F784B
"""Number of the stream. It is always the same, so that the same speech gives the same bytes."""

_FIRST, _LAST = 2, 4


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
        table.append(crc)
    return table


_CRC = _crc_table()


class OggWriter:
    """Writes packets as pages."""

    def __init__(self) -> None:
        self._num_pages = 0

    def page(self, packets: Sequence[bytes], granule: int, is_last: bool = False) -> bytes:
        """One page.

        Args:
            packets: whole packets, at most `MAX_PAGE_PACKETS`.
            granule: position at the end of the last of them.
            is_last: no page follows.
        """
        segments = b"".join(bytes([255] * (len(p) // 255) + [len(p) % 255]) for p in packets)
        flags = (0 if self._num_pages else _FIRST) | (_LAST if is_last else 0)
        head = struct.pack("<4sBBqII", b"OggS", 0, flags, granule, _SERIAL, self._num_pages)
        self._num_pages += 1
        rest = bytes([len(segments)]) + segments + b"".join(packets)
        crc = 0
        for byte in head + b"\0\0\0\0" + rest:
            crc = crc << 8 & 0xFFFFFFFF ^ _CRC[crc >> 24 ^ byte]
        return head + struct.pack("<I", crc) + rest
