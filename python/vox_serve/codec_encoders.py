"""Encoders of MP3, Opus, AAC and FLAC: ffmpeg's codecs through PyAV, in containers of our own.

Speech is 24 kHz mono. Each container is written here, since it is a few bytes and ffmpeg's muxers
write lengths into it afterwards, or hold data back.

An encoder delays speech and adds silence after it. Opus declares both, and so does a whole MP3, in
a LAME tag: decoders return exactly the samples that were fed. FLAC adds nothing. ADTS cannot
declare it, nor can an MP3 of a length that is not known yet: a header that gave one would end
playback there. `_Undeclared` leaves out packets instead.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar

import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.codec.context import CodecContext
from av.packet import Packet

from vox_serve.audio import SAMPLE_RATE_HZ
from vox_serve.mp3_info import DECODER_DELAY, ENCODER_DELAY, info_frame
from vox_serve.ogg import MAX_PAGE_PACKETS, OggWriter
from vox_serve.provenance import adts_tail, id3_tag, vorbis_comment

SAMPLE_BYTES = 2

QUIET = 64
"""Magnitude of 16-bit samples, -54 dBFS, up to which nobody hears some milliseconds of speech."""


class _CodecEncoder(ABC):
    """Base of the encoders, which are stages of encoders.py.

    Attributes:
        codec: ffmpeg's name of it.
        sample_format: of its input: s16, s16p (equal in mono) or fltp.
        options: its settings, as ffmpeg's command line names them.
        min_samples: shorter speech is followed by silence, since decoders need some packets.
    """

    codec: ClassVar[str]
    sample_format: ClassVar[str] = "s16"
    options: ClassVar[dict[str, str]] = {}
    min_samples: ClassVar[int] = 1920

    def __init__(self, note: str | None, num_samples: int | None) -> None:
        context = CodecContext.create(self.codec, "w")
        assert isinstance(context, AudioCodecContext)
        self._context = context
        self._context.sample_rate = SAMPLE_RATE_HZ
        self._context.layout = "mono"
        self._context.format = self.sample_format
        self._context.options = self.options
        self._context.open()
        self._frame_bytes = self._context.frame_size * SAMPLE_BYTES
        self._pcm = bytearray()
        self._num_samples = self._num_encoded = 0
        self._head: bytes | None = self.head(note, num_samples)

    @abstractmethod
    def head(self, note: str | None, num_samples: int | None) -> bytes:
        """The bytes before the first packet."""

    @abstractmethod
    def wrapped(self, packets: list[bytes], is_last: bool) -> bytes:
        """Packets in the container."""

    def feed(self, data: bytes) -> bytes:
        self._pcm += data
        self._num_samples += len(data) // SAMPLE_BYTES
        packets = self._whole_frames()
        return self._take_head() + self.wrapped(packets, is_last=False)

    def close(self) -> bytes:
        missing = max(self.min_samples - self._num_samples, 0)
        self._pcm += bytes(missing * SAMPLE_BYTES)
        packets = self._whole_frames()
        packets += self._encoded(self._pcm) if self._pcm else []
        packets += self._packets(None)
        return self._take_head() + self.wrapped(packets, is_last=True)

    def _whole_frames(self) -> list[bytes]:
        """Encode as much as makes whole frames; the rest stays."""
        packets: list[bytes] = []
        end = len(self._pcm) - len(self._pcm) % self._frame_bytes
        for start in range(0, end, self._frame_bytes):
            packets += self._encoded(self._pcm[start : start + self._frame_bytes])
        del self._pcm[:end]
        return packets

    def _take_head(self) -> bytes:
        head, self._head = self._head, None
        return head or b""

    def _encoded(self, pcm: bytes | bytearray) -> list[bytes]:
        samples = np.frombuffer(bytes(pcm), "<i2")[None]
        if self.sample_format == "fltp":
            samples = samples.astype(np.float32) / 32768
        frame = AudioFrame.from_ndarray(samples, format=self.sample_format, layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.time_base = Fraction(1, SAMPLE_RATE_HZ)
        frame.pts = self._num_encoded
        self._num_encoded += samples.size
        return self._packets(frame)

    def _packets(self, frame: AudioFrame | None) -> list[bytes]:
        packets: list[Packet] = self._context.encode(frame)
        return [bytes(packet) for packet in packets if packet.size]


class Flac(_CodecEncoder):
    """A FLAC frame for each frame of speech. Of a stream, the length stays undeclared."""

    codec = "flac"
    options: ClassVar = {"frame_size": "1920", "compression_level": "5"}
    min_samples = 16

    def head(self, note: str | None, num_samples: int | None) -> bytes:
        info = bytearray(bytes(self._context.extradata or b"")[:34])
        # The last 36 bits before the checksum are the length; 0 stands for unknown.
        info[13:18] = (int.from_bytes(info[13:18]) | (num_samples or 0)).to_bytes(5)
        comment = vorbis_comment(note)
        last_block = 0x80
        return (
            b"fLaC"
            + struct.pack(">I", len(info))
            + info
            + struct.pack(">I", (last_block | 4) << 24 | len(comment))
            + comment
        )

    def wrapped(self, packets: list[bytes], is_last: bool) -> bytes:
        return b"".join(packets)


class Opus(_CodecEncoder):
    """Opus in Ogg (RFC 7845), with a page for each frame of speech at least."""

    codec = "libopus"
    options: ClassVar = {"b": "48000", "application": "audio", "compression_level": "5"}
    packet_granules = 960  # 20 ms, always counted at 48 kHz

    def head(self, note: str | None, num_samples: int | None) -> bytes:
        identity = bytes(self._context.extradata or b"")
        self._pre_skip = int.from_bytes(identity[10:12], "little")
        self._granule = 0
        self._ogg = OggWriter()
        tags = b"OpusTags" + vorbis_comment(note)
        return self._ogg.page([identity], 0) + self._ogg.page([tags], 0)

    def wrapped(self, packets: list[bytes], is_last: bool) -> bytes:
        pages = []
        while packets or is_last:
            some, packets = packets[:MAX_PAGE_PACKETS], packets[MAX_PAGE_PACKETS:]
            self._granule += self.packet_granules * len(some)
            ends = is_last and not packets
            if ends:  # the position of the last sample: decoders drop the rest of the packet
                end = self._pre_skip + self._num_samples * 48_000 // SAMPLE_RATE_HZ
                self._granule = min(self._granule, end)
                is_last = False
            pages.append(self._ogg.page(some, self._granule, ends))
        return b"".join(pages)


class _Undeclared(_CodecEncoder):
    """Base of the encoders whose containers may not be able to declare delay and padding.

    Decoders would return up to three codec frames more than was fed. Packets before and after all
    speech are left out, and so is one that completes only a quiet start or end. Where speech begins
    and ends abruptly, up to two codec frames are left.

    Attributes:
        delay_samples: silence before speech, in encoder and decoder together.
        num_silent: packets before those that have to do with speech.
        start_samples: speech that a decoder garbles if one packet more is left out.
    """

    delay_samples: ClassVar[int]
    num_silent: ClassVar[int]
    start_samples: ClassVar[int]

    def head(self, note: str | None, num_samples: int | None) -> bytes:
        self._declared = num_samples
        self._num_packets = 0
        self._is_quiet_start = True
        self._end = b""
        return b""

    def feed(self, data: bytes) -> bytes:
        if not self._num_samples:
            start = data[: self.start_samples * SAMPLE_BYTES]
            self._is_quiet_start = len(start) == self.start_samples * SAMPLE_BYTES
            self._is_quiet_start &= _is_quiet(start)
        self._end = (self._end + data)[-self._frame_bytes :]
        return super().feed(data)

    def trimmed(self, packets: list[bytes], is_last: bool, keeps_ends: bool = False) -> list[bytes]:
        """The packets that are sent.

        Args:
            packets: the next ones.
            is_last: none follow.
            keeps_ends: leave out only what comes after speech.
        """
        first = 0 if keeps_ends else self.num_silent + self._is_quiet_start
        kept = packets[max(first - self._num_packets, 0) :]
        self._num_packets += len(packets)
        if is_last:
            num_samples = max(self._num_samples, self.min_samples)
            excess = self._num_packets - self.num_packets_of(num_samples)
            excess += not keeps_ends and not self._is_quiet_start and _is_quiet(self._end)
            kept = kept[: max(len(kept) - excess, 0)]
        return kept

    def num_packets_of(self, num_samples: int) -> int:
        """Packets in which so many samples are complete."""
        return -(-(num_samples + self.delay_samples) // self._context.frame_size)


class Mp3(_Undeclared):
    """MP3 at a constant rate."""

    codec = "libmp3lame"
    sample_format = "s16p"
    # Without the reservoir each frame can be decoded alone, so that the first may be left out.
    options: ClassVar = {"b": "64000", "reservoir": "0", "compression_level": "5"}
    delay_samples = ENCODER_DELAY + DECODER_DELAY
    num_silent = 1
    start_samples = 1152
    _is_tagged = False

    def head(self, note: str | None, num_samples: int | None) -> bytes:
        tag = id3_tag(note) if note is not None else b""
        return super().head(note, num_samples) + tag

    def wrapped(self, packets: list[bytes], is_last: bool) -> bytes:
        packets = self.trimmed(packets, is_last, keeps_ends=self._declared is not None)
        if packets and self._declared is not None and not self._is_tagged:
            self._is_tagged = True
            num_packets = self.num_packets_of(max(self._declared, self.min_samples))
            packets = [info_frame(packets[0], num_packets, self._declared), *packets]
        return b"".join(packets)


class Aac(_Undeclared):
    """AAC-LC in ADTS frames, and metadata after them.

    Attributes:
        num_tagged: fewer frames have no metadata: ffmpeg would not know the format any more.
    """

    codec = "aac"
    sample_format = "fltp"
    options: ClassVar = {"b": "64000"}
    delay_samples = 1024
    num_silent = 0
    start_samples = 1024
    num_tagged: ClassVar[int] = 3

    def head(self, note: str | None, num_samples: int | None) -> bytes:
        self._tail = adts_tail(note) if note is not None else b""
        self._num_sent = 0
        return super().head(note, num_samples)

    def wrapped(self, packets: list[bytes], is_last: bool) -> bytes:
        packets = self.trimmed(packets, is_last)
        self._num_sent += len(packets)
        frames = b"".join(_adts_header(len(packet)) + packet for packet in packets)
        return frames + (self._tail if is_last and self._num_sent >= self.num_tagged else b"")


def _is_quiet(pcm: bytes) -> bool:
    return bool((np.abs(np.frombuffer(pcm, "<i2").astype(np.int32)) <= QUIET).all())


def _adts_header(num_bytes: int) -> bytes:
    """The header of an ADTS frame: AAC-LC, 24 kHz, mono, no checksum."""
    frequency_index, channels, header_bytes = 6, 1, 7
    bits = 0xFFF1 << 40 | 1 << 38 | frequency_index << 34 | channels << 30
    bits |= (num_bytes + header_bytes) << 13 | 0x7FF << 2
    return bits.to_bytes(header_bytes)


ENCODERS: dict[str, Callable[[str | None, int | None], _CodecEncoder]] = {
    "mp3": Mp3,
    "opus": Opus,
    "aac": Aac,
    "flac": Flac,
}
