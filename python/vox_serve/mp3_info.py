"""The frame at the start of an MP3 that declares its length and its encoder's delay.

Xing's header with LAME's extension: http://gabriel.mp3-tech.org/mp3infotag.html
"""

import struct

FRAME_SAMPLES = 576
"""Samples of a frame of MPEG-2 Layer III, which 24 kHz is."""

ENCODER_DELAY = 576
DECODER_DELAY = 529
"""Samples that every decoder adds to the encoder's delay."""

_HEAD_BYTES, _SIDE_INFO_BYTES = 4, 9  # without a checksum, mono


def info_frame(frame: bytes, num_frames: int, num_samples: int) -> bytes:
    """The frame before the first one.

    Args:
        frame: any frame of the stream, all of which are equally long.
        num_frames: frames that follow.
        num_samples: speech in them.
    """
    padding = num_frames * FRAME_SAMPLES - ENCODER_DELAY - num_samples
    info = bytearray(len(frame))
    info[:_HEAD_BYTES] = frame[:_HEAD_BYTES]
    start = _HEAD_BYTES + _SIDE_INFO_BYTES
    has_frames, has_bytes = 1, 2
    size = (num_frames + 1) * len(frame)
    fields = struct.pack(">4sIII", b"Info", has_frames | has_bytes, num_frames, size)
    fields += b"LAME3.100" + bytes([1])  # tag's revision 0, constant bit rate
    fields += bytes(11)  # lowpass, replay gain, flags, bit rate: unknown
    fields += (ENCODER_DELAY << 12 | padding).to_bytes(3)
    fields += bytes(4)  # misc, MP3 gain, preset: unknown
    fields += struct.pack(">IH", size, 0)  # the checksum of the frames is not known yet
    info[start : start + len(fields)] = fields
    end = start + len(fields)
    info[end : end + 2] = _crc16(info[:end]).to_bytes(2)
    return bytes(info)


def _crc16(data: bytes | bytearray) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
