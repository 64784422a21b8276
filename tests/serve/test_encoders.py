"""Every encoder, streamed and whole: decoded by PyAV and libsndfile, beside the samples."""

import io
import struct
import wave
from itertools import pairwise

import numpy as np
import pytest

from audio_decoding import RATE_HZ, delay_of, speech_like, with_av, with_soundfile
from vox_serve.audio import wav_file, wav_header
from vox_serve.encoders import open_encoder, open_shaper, open_stream
from vox_serve.formats import FORMATS, FormatError, Output, format_of_accept, format_of_ending
from vox_serve.provenance import SOURCE_TYPE, note_of

NOTE = note_of("demo")
FRAME_BYTES = 3840
CODEC_FRAME = {"mp3": 576, "aac": 1024, "opus": 480, "flac": 1920}
NUM_SAMPLES = 27 * 1920
CONTAINERS = pytest.mark.parametrize("name", ["wav", "mp3", "opus", "aac", "flac"])
WHOLE = pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])


def pieces_of(name: str, pcm: np.ndarray, whole: bool, piece_bytes: int = FRAME_BYTES):
    encoder = open_encoder(Output.of(name), NOTE, len(pcm) if whole else None)
    data = pcm.tobytes()
    pieces = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)]
    return [*map(encoder.feed, pieces), encoder.close()]


def file_of(name: str, pcm: np.ndarray, whole: bool, piece_bytes: int = FRAME_BYTES) -> bytes:
    return b"".join(pieces_of(name, pcm, whole, piece_bytes))


def readers(name: str, whole: bool):
    is_known = name != "aac" and (whole or name != "flac")
    return [with_av, with_soundfile] if is_known else [with_av]


def at_24_khz(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    assert rate_hz in (RATE_HZ, 2 * RATE_HZ)  # Opus decodes to 48 kHz
    return samples[:: rate_hz // RATE_HZ]


@WHOLE
@CONTAINERS
@pytest.mark.parametrize("num_samples", [NUM_SAMPLES, NUM_SAMPLES + 1, 1920])
def test_decoded_length_is_within_a_codec_frame(name, whole, num_samples):
    pcm = np.zeros(num_samples, "<i2")
    pcm[2000:-3000] = speech_like(num_samples)[2000:-3000]
    for read in readers(name, whole):
        samples, rate_hz, _ = read(file_of(name, pcm, whole))
        excess = len(samples) * RATE_HZ // rate_hz - num_samples
        if name in ("aac", "mp3") and not (name == "mp3" and whole):
            assert abs(excess) < CODEC_FRAME[name]
        else:
            assert excess == 0


@CONTAINERS
def test_abrupt_speech_keeps_its_ends(name):
    pcm = speech_like(NUM_SAMPLES, quiet=False)
    for read in readers(name, whole=False):
        samples, rate_hz, _ = read(file_of(name, pcm, whole=False))
        excess = len(samples) * RATE_HZ // rate_hz - NUM_SAMPLES
        assert 0 <= excess < 2 * CODEC_FRAME.get(name, 1)


@WHOLE
@CONTAINERS
@pytest.mark.parametrize("quiet", [True, False])
def test_decoded_speech_is_the_speech(name, whole, quiet):
    pcm = speech_like(NUM_SAMPLES, quiet)
    samples, rate_hz, _ = with_av(file_of(name, pcm, whole))
    delay, correlation = delay_of(at_24_khz(samples, rate_hz), pcm)
    assert correlation > (0.98 if name == "opus" else 0.99)
    is_exact = name in ("wav", "opus", "flac") or (name == "mp3" and whole)
    assert delay == 0 if is_exact else -47 <= delay <= 1024
    if name in ("wav", "flac"):
        assert np.array_equal(np.rint(samples * 32768), pcm)


@WHOLE
@CONTAINERS
def test_no_click_at_the_start(name, whole):
    pcm = speech_like(NUM_SAMPLES)
    samples, rate_hz, _ = with_av(file_of(name, pcm, whole))
    start = at_24_khz(samples, rate_hz)[:1200]
    assert np.abs(start).max() < 0.01  # the speech itself begins later, at 0.5


@WHOLE
@CONTAINERS
def test_the_pieces_make_no_difference(name, whole):
    pcm = speech_like(NUM_SAMPLES)
    expected = with_av(file_of(name, pcm, whole))
    for piece_bytes in (2 * 1153, 50_000):
        decoded = with_av(file_of(name, pcm, whole, piece_bytes))
        assert np.array_equal(decoded.samples, expected.samples)
    assert file_of(name, pcm, whole) == file_of(name, pcm, whole)


@CONTAINERS
def test_bytes_come_with_each_frame(name):
    pieces = pieces_of(name, speech_like(NUM_SAMPLES), whole=False)
    assert all(pieces[name == "aac" : -1])  # AAC's first packet comes with the second frame
    decoded = with_av(b"".join(pieces[:5]))  # AAC and MP3 look ahead, LAME for 76 ms
    assert len(decoded.samples) / decoded.rate_hz >= (0.4 if name in ("wav", "flac") else 0.28)


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
def test_one_container(name):
    content = file_of(name, speech_like(NUM_SAMPLES), whole=False)
    marks = {"mp3": b"ID3", "opus": b"OpusHead", "aac": b"APETAGEX\xd0\x07", "flac": b"fLaC"}
    assert content.count(marks[name]) == (2 if name == "aac" else 1)  # both ends of the tag
    assert content.startswith(b"ID3") == (name == "mp3")  # browsers take the file for an MP3
    assert b"Xing" not in content
    assert b"Info" not in content  # a header that declares a wrong length


def test_pages_of_opus():
    content = file_of("opus", speech_like(NUM_SAMPLES), whole=False)
    pages = content.split(b"OggS")[1:]
    flags = [page[1] for page in pages]
    granules = [struct.unpack_from("<q", page, 2)[0] for page in pages]
    assert flags == [2] + [0] * (len(pages) - 2) + [4]
    assert [struct.unpack_from("<I", page, 14)[0] for page in pages] == list(range(len(pages)))
    pre_skip = struct.unpack_from("<H", content, content.index(b"OpusHead") + 10)[0]
    assert granules[-1] == pre_skip + 2 * NUM_SAMPLES
    assert all(b - a == 4 * 960 for a, b in pairwise(granules[1:-1]))


@WHOLE
@CONTAINERS
def test_provenance(name, whole):
    metadata = with_av(file_of(name, speech_like(NUM_SAMPLES), whole)).metadata
    if name == "wav" and not whole:  # the header of a stream is 44 bytes, as ever
        return
    assert metadata["COMMENT"] == NOTE
    assert metadata["ISRC" if name == "wav" else "DIGITALSOURCETYPE"] == SOURCE_TYPE


def test_no_provenance_without_a_note():
    pcm = speech_like(NUM_SAMPLES)
    for name in FORMATS:
        for num_samples in (None, NUM_SAMPLES):
            encoder = open_encoder(Output.of(name), None, num_samples)
            content = encoder.feed(pcm.tobytes()) + encoder.close()
            assert b"AI-generated" not in content
            assert SOURCE_TYPE.encode() not in content


@pytest.mark.parametrize("model", ["demo", "sesame/csm-1b", "/srv/secret/csm", "../x/csm", "Grüße"])
def test_a_note_names_no_folder(model):
    note = note_of(model)
    assert note.isascii()
    assert note.startswith("AI-generated speech, VoxKern, ")
    assert "secret" not in note


def test_a_wav_has_its_samples_after_44_bytes():
    pcm = speech_like(NUM_SAMPLES)
    assert file_of("wav", pcm, whole=False) == wav_header(None) + pcm.tobytes()
    whole = file_of("wav", pcm, whole=True)
    assert whole[44 : 44 + 2 * NUM_SAMPLES] == pcm.tobytes()
    assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
    assert len(whole) % 2 == 0
    with wave.open(io.BytesIO(whole)) as reader:
        assert reader.readframes(10**9) == pcm.tobytes()
    plain = open_encoder(Output.of("wav"), None, NUM_SAMPLES)
    assert plain.feed(pcm.tobytes()) + plain.close() == wav_file(pcm.tobytes())


@WHOLE
@CONTAINERS
@pytest.mark.parametrize("num_samples", [0, 480])
def test_hardly_any_speech_is_a_valid_file(name, whole, num_samples):
    samples, rate_hz, _ = with_av(file_of(name, speech_like(1920)[:num_samples], whole))
    length = len(samples) * RATE_HZ // rate_hz
    if name in ("wav", "opus") or (name == "mp3" and whole and num_samples):
        assert length == num_samples
    else:
        assert num_samples <= length <= 2304


def test_ulaw():
    every = np.arange(-32768, 32768).astype("<i2")
    encoder = open_encoder(Output.of("ulaw"))
    codes = np.frombuffer(encoder.feed(every.tobytes()) + encoder.close(), np.uint8)
    assert len(codes) == len(every)
    # G.711's table: positive and negative zero, and the ends of the range.
    assert [codes[32768 + x] for x in (0, -1, 32767, -32768)] == [0xFF, 0x7F, 0x80, 0x00]
    au = b".snd" + struct.pack(">IIIII", 24, len(codes), 1, 8000, 1) + codes.tobytes()
    decoded = with_soundfile(au).samples * 32768
    steps = np.maximum(np.abs(every.astype(np.int32)) / 16, 8)
    assert (np.abs(decoded - every) <= steps).all()


@pytest.mark.parametrize("rate_hz", [8000, 16_000, 48_000])
def test_a_sample_rate_without_seams(rate_hz):
    t = np.arange(NUM_SAMPLES) / RATE_HZ
    pcm = (np.sin(2 * np.pi * 1000 * t) * 20_000).astype("<i2")
    output = Output.of("pcm", rate_hz)
    streamed = open_stream(output)
    data = pcm.tobytes()
    content = b"".join(
        streamed.feed(data[i : i + FRAME_BYTES]) for i in range(0, len(data), FRAME_BYTES)
    )
    content += streamed.close()
    at_once = open_stream(output)
    assert at_once.feed(data) + at_once.close() == content
    samples = np.frombuffer(content, "<i2")
    assert len(samples) == NUM_SAMPLES * rate_hz // RATE_HZ
    exact = np.sin(2 * np.pi * 1000 * np.arange(len(samples)) / rate_hz) * 20_000
    inner = slice(rate_hz // 50, -rate_hz // 50)  # a tone that begins abruptly rings
    assert np.abs(samples - exact)[inner].max() < 8


def test_telephony_is_ulaw_at_8_khz():
    pcm = speech_like(NUM_SAMPLES)
    encoder = open_stream(Output.of("ulaw"))
    assert len(encoder.feed(pcm.tobytes()) + encoder.close()) == NUM_SAMPLES // 3


@pytest.mark.parametrize("speed", [0.25, 0.3, 0.5, 0.8, 1.25, 2.0, 3.7, 4.0])
def test_speed_changes_the_length_and_keeps_the_pitch(speed):
    t = np.arange(4 * RATE_HZ) / RATE_HZ
    pcm = (np.sin(2 * np.pi * 220 * t) * 20_000).astype("<i2")
    shaper = open_shaper(Output.of("pcm", speed=speed))
    data = pcm.tobytes()
    pieces = [shaper.feed(data[i : i + FRAME_BYTES]) for i in range(0, len(data), FRAME_BYTES)]
    assert sum(map(bool, pieces)) > 0.6 * len(pieces)  # it streams
    samples = np.frombuffer(b"".join(pieces) + shaper.close(), "<i2")
    assert len(samples) == pytest.approx(len(pcm) / speed, abs=2048)
    assert abs(int(samples[0])) < 2500
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    pitch_hz = np.argmax(spectrum) * RATE_HZ / len(samples)
    assert pitch_hz == pytest.approx(220, abs=1.5)


def test_nothing_is_shaped_without_need():
    assert open_shaper(Output.of("mp3")) is None
    assert open_shaper(Output.of("pcm", 24_000, 1.0)) is None


def test_outputs():
    assert Output.of("ulaw").rate_hz == 8000
    assert Output.of("pcm", 16_000).rate_hz == 16_000
    with pytest.raises(FormatError, match="wav, pcm, mp3, opus, aac, flac or ulaw") as error:
        Output.of("vorbis")
    assert error.value.param == "format"
    with pytest.raises(FormatError, match="use 8000, 16000, 24000 or 48000") as error:
        Output.of("pcm", 44_100)
    assert error.value.param == "sample_rate"
    with pytest.raises(FormatError):
        Output.of("mp3", 8000)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("", None),
        ("*/*", None),
        ("audio/*", None),
        ("audio/mpeg", "mp3"),
        ("text/html, audio/ogg;codecs=opus;q=0.9, */*;q=0.8", "opus"),
        ("audio/mpeg;q=0.5, AUDIO/FLAC", "flac"),
        ("audio/mpeg;q=x, audio/aac;q=0", None),
        ("application/json", None),
    ],
)
def test_accept_headers(header, name):
    assert format_of_accept(header) == name


def test_endings_of_files():
    given = ["a.MP3", "b.ogg", "c.wav", "d.ul", "/x.mp3/e", "f.txt", "mp3", "-"]
    formats = ["mp3", "opus", "wav", "ulaw", None, None, None, None]
    assert [format_of_ending(path) for path in given] == formats
