"""Contexts of unknown origin: codes and recordings are bounded, and one line names the entry."""

import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from limits import memory_limit, refusal
from vox_serve import recording
from vox_serve.context_file import ContextError, load_context
from vox_serve.recording import AudioError, read_audio


def npy(shape: str, descr: str = "'<i8'", data: bytes = bytes(96), version=b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy("(1000000000000, 4)"), "1000000000000 frames, the model's context 256"),
        (npy("(-1, 4)"), "-1 frames"),
        (npy("(3, 4)", data=bytes(95)), "cut short"),
        (npy("(3, 4)", "'>i8'"), "got >i8"),
        (npy("(3, 4)", "'|O'"), "got object"),
        (npy("(3, 4)", "'<i8x'"), "no .npy file"),
        (npy("(3, 4)", "[('a', '<i8')]"), "codes must be int64"),
        (npy("(" * 300 + ")" * 300), "no .npy file"),
        (npy("(3, 4)" + " " * 60_000, version=b"\x01\x00"), "no .npy file"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "no .npy file"),
        (b"\x93NUMPY\x09\x00", "version (9, 0)"),
        (b"PK\x03\x04" + bytes(100), "several arrays"),
        (b"", "no .npy file"),
    ],
)
def test_codes_are_bounded_by_the_context(tmp_path, mimi, config, data, said):
    (tmp_path / "a.npy").write_bytes(data)
    message = context_refusal(tmp_path, mimi, config, codes="a.npy")
    assert "context.json, entry 0: codes: " in message
    assert "a.npy" in message
    assert said in message


def context_refusal(folder: Path, mimi, config, **field) -> str:
    path = folder / "context.json"
    path.write_text(json.dumps([{"speaker": 0, "text": "hi", **field}]))
    with memory_limit(), pytest.raises(ContextError) as error:
        load_context(path, mimi, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_codes_in_fortran_order(tmp_path, mimi, config):
    codes = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(codes))
    path = tmp_path / "context.json"
    path.write_text('[{"speaker": 0, "text": "hi", "codes": "a.npy"}]')
    assert load_context(path, mimi, config)[0].codes.tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"speaker": 10**400}, "speaker must be"),
        ({"speaker": 2**40}, "speaker must be"),
        ({"text": "x" * 100_001}, "at most 100000 characters"),
        ({"text": "\ud800"}, "valid Unicode"),
        ({"text": ["x"] * 1000}, "text must be"),
        ({"x" * 10_000: 1}, "is no field"),
        ({"codes": "\0"}, ""),
        ({"codes": "/dev/zero"}, "not a regular file"),
        ({"codes": "x" * 5000}, ""),
    ],
)
def test_context_entries_are_bounded(tmp_path, mimi, config, entry, said):
    assert said in context_refusal(tmp_path, mimi, config, **{"codes": "a.npy"} | entry)


def test_a_context_has_no_more_entries_than_positions(tmp_path, mimi, config):
    path = tmp_path / "context.json"
    path.write_text(json.dumps([{}] * 257))
    assert "257 segments, more than" in refusal(load_context, path, mimi, config)


def test_a_context_has_no_more_frames_than_positions(tmp_path, mimi, config):
    np.save(tmp_path / "a.npy", np.zeros((100, config.num_codebooks), np.int64))
    path = tmp_path / "context.json"
    path.write_text(json.dumps([{"speaker": 0, "text": "hi", "codes": "a.npy"}] * 200))
    said = refusal(load_context, path, mimi, config)
    assert "entry 2: the segments up to here have 300 frames" in said


def wav(
    samples: bytes, rate: int = 24_000, channels: int = 1, bits: int = 16, tag: int = 1
) -> bytes:
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (wav(bytes(100), rate=1), "samples per second"),
        (wav(bytes(100), rate=2**32 - 1), ""),
        (wav(bytes(4096), channels=1024), ""),
        (wav(bytes(2600), channels=65), "channels"),
        (wav(np.float32([0, np.nan]).tobytes(), bits=32, tag=3), "not numbers"),
        (wav(np.float32([0, -np.inf]).tobytes(), bits=32, tag=3), "not numbers"),
        (wav(np.float32([0, 1e38]).tobytes(), bits=32, tag=3), "beyond 65536"),
        (wav(b""), "no samples"),
        (wav(bytes(12), rate=300_000), "0.02 ms long; at least 0.1 s"),
        (wav(bytes(480)), "10 ms long; at least 0.1 s are needed"),
        (wav(bytes(48_000)), "is silent"),
        (b"RIFF", ""),
        (b"fLaC" + bytes(100), ""),
        (b"OggS" + bytes(100), ""),
    ],
)
def test_bad_recordings(tmp_path, mimi, config, data, said):
    (tmp_path / "a.wav").write_bytes(data)
    message = context_refusal(tmp_path, mimi, config, audio="a.wav")
    assert "audio: " in message
    assert "a.wav" in message
    assert said in message


@pytest.mark.parametrize("kind", [("a.flac", "FLAC"), ("a.ogg", "OGG"), ("a.mp3", "MP3")])
def test_compressed_silence_is_read_no_further_than_the_context(
    tmp_path, mimi, config, kind, monkeypatch
):
    name, form = kind
    with soundfile.SoundFile(tmp_path / name, "w", 8000, 1, format=form) as file:
        for _ in range(5):
            file.write(np.zeros(8000 * 60, np.float32))
    assert (tmp_path / name).stat().st_size < 8_000_000
    read = []
    monkeypatch.setattr(recording, "_BLOCK_SAMPLES", 8000)
    original = soundfile.SoundFile.read

    def counted(self, *arguments, **keywords):
        block = original(self, *arguments, **keywords)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    message = context_refusal(tmp_path, mimi, config, audio=name)
    assert f"{name} is 300 s long; at most 20.48 s fit" in message
    assert sum(read) == 0
    # A header may state too little, or nothing.
    monkeypatch.setattr(soundfile.SoundFile, "frames", 2**63 - 1)
    message = context_refusal(tmp_path, mimi, config, audio=name)
    assert f"{name} is longer than 20.48 s" in message
    assert sum(read) <= 8000 * 22


@pytest.mark.parametrize(
    ("subtype", "block", "samples"),
    [(17, 65535, 65535), (2, 8, 65535), (49, 65, 65535)],
    ids=["IMA ADPCM", "MS ADPCM", "GSM"],
)
def test_a_header_that_makes_few_bytes_many_samples(tmp_path, subtype, block, samples):
    """Block formats say themselves how many samples a block of bytes holds."""
    form = struct.pack("<HHIIHHHH", subtype, 1, 8000, 8000, block, 4, 2, samples)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"fact" + struct.pack("<II", 4, 2**32 - 1)
    body += b"data" + struct.pack("<I", 2**32 - 1) + bytes(1000)
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    with memory_limit(), suppress(AudioError):
        assert len(read_audio(path, max_s=10)) <= 10 * 24_000


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 16])
def test_reading_in_blocks_gives_the_samples_of_one_read(tmp_path, channels, monkeypatch):
    path = tmp_path / "a.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, (5001, channels))
    soundfile.write(path, noise, 24_000, "FLOAT")
    whole, _ = soundfile.read(path, dtype="float32", always_2d=True)
    for size in (7, 5000, 5001, 1 << 16):
        monkeypatch.setattr(recording, "_BLOCK_SAMPLES", size)
        np.testing.assert_array_equal(read_audio(path), whole.mean(axis=1))


def test_a_recording_of_just_the_longest_length(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(24_000), 24_000)
    assert len(read_audio(path, max_s=1)) == 24_000
    soundfile.write(path, np.zeros(24_001), 24_000)
    with pytest.raises(AudioError, match=r"is 1\.00004 s long; at most 1 s fit"):
        read_audio(path, max_s=1)
