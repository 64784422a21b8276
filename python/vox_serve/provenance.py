"""Marks synthetic speech in the metadata of every format, so that machines can tell."""

import struct

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model made."""

HEADER = "X-Synthetic-Speech"
"""The response header that has the note."""

SOFTWARE = "VoxKern"


def public_name(model: str) -> str:
    """A model's name for clients, in ASCII.

    Args:
        model: its name, hub id or folder. Only the name of a folder is told.
    """
    name = model.rstrip("/\\")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or "\\" in name:  # no hub id
        name = name.replace("\\", "/").rpartition("/")[2]
    printable = "".join(c if " " <= c <= "~" else "?" for c in name)
    return printable[:100] or "model"


def note_of(model: str) -> str:
    """The note that says where speech comes from, in ASCII; `model` as in `public_name`."""
    return f"AI-generated speech, {SOFTWARE}, {public_name(model)}"


def info_chunk(note: str) -> bytes:
    """A WAV's LIST INFO chunk."""
    fields = b"".join(
        _riff_field(name, text)
        for name, text in ((b"ICMT", note), (b"ISFT", SOFTWARE), (b"ISRC", SOURCE_TYPE))
    )
    return struct.pack("<4sI4s", b"LIST", len(fields) + 4, b"INFO") + fields


def _riff_field(name: bytes, text: str) -> bytes:
    data = text.encode("ascii") + b"\0"
    return struct.pack("<4sI", name, len(data)) + data + b"\0" * (len(data) % 2)


def id3_tag(note: str, private: bytes = b"") -> bytes:
    """An ID3v2.3 tag, for MP3; `private` is the content of a last frame that readers skip."""
    frames = (
        _id3_frame(b"TSSE", b"\0" + SOFTWARE.encode("ascii"))
        + _id3_frame(b"COMM", b"\0eng\0" + note.encode("ascii"))
        + _id3_frame(b"TXXX", b"\0DIGITALSOURCETYPE\0" + SOURCE_TYPE.encode("ascii"))
        + (_id3_frame(b"PRIV", b"APETAGEX\0" + private) if private else b"")
    )
    size = len(frames)
    synchsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + synchsafe + frames


def _id3_frame(name: bytes, data: bytes) -> bytes:
    return struct.pack(">4sIH", name, len(data), 0) + data


def ape_tag(note: str) -> bytes:
    """An APEv2 tag, which is found by its last bytes."""
    texts = {"Comment": note, "DIGITALSOURCETYPE": SOURCE_TYPE, "Encoder": SOFTWARE}
    items = b"".join(
        struct.pack("<II", len(text), 0) + name.encode("ascii") + b"\0" + text.encode("ascii")
        for name, text in texts.items()
    )

    def end(flags: int) -> bytes:
        size = len(items) + 32  # with the footer
        return b"APETAGEX" + struct.pack("<IIII8x", 2000, size, len(texts), flags)

    has_header, is_header = 1 << 31, 1 << 29
    return end(has_header | is_header) + items + end(has_header)


def adts_tail(note: str) -> bytes:
    """Metadata for the end of an AAC in ADTS frames: an APEv2 tag in a frame of an ID3v2 tag.

    At the beginning an ID3 tag would make browsers that look there, as Firefox does, take the file
    for an MP3. Programs that look at the end of a file find the APE tag. Those that read a stream
    skip all of it as an ID3 tag, while ffmpeg would take an APE tag for damaged frames.
    """
    return id3_tag(note, ape_tag(note))


def vorbis_comment(note: str | None) -> bytes:
    """A Vorbis comment, for FLAC and Opus; without a note it names only the software."""
    texts = [f"ENCODER={SOFTWARE}"]
    if note is not None:
        texts += [f"COMMENT={note}", f"DIGITALSOURCETYPE={SOURCE_TYPE}"]
    comments = [text.encode("ascii") for text in texts]
    parts = [SOFTWARE.encode("ascii"), *comments]
    lengths = [struct.pack("<I", len(part)) + part for part in parts]
    return lengths[0] + struct.pack("<I", len(comments)) + b"".join(lengths[1:])
