"""Training text from novels: Jane Austen's, without the one that test chapters come from.

They are in Debian's `r-cran-janeaustenr`, as R stores a package's data: a file of objects, each of
them serialised, compressed by zlib and preceded by its length.
"""

import re
import struct
import zlib
from pathlib import Path

R_DATA = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
LEFT_OUT = "PRIDE AND PREJUDICE"
MAX_PART_CHARS = 100  # as `max_part_chars` of the exported voice

_STRING = re.compile(rb"\x00\x04\x00\x09(.{4})", re.DOTALL)  # of the type of a character string


def objects(data: bytes):
    """The serialised objects of an R data file."""
    start = 0
    while start < len(data):
        decompressor = zlib.decompressobj()
        yield decompressor.decompress(data[start + 4 :])
        start = len(data) - len(decompressor.unused_data)


def lines(serialised: bytes) -> list[str]:
    """The strings of a serialised vector of strings."""
    found, start = [], 0
    while match := _STRING.search(serialised, start):
        (size,) = struct.unpack(">i", match[1])
        start = match.end() + max(size, 0)
        found.append(serialised[match.end() : start].decode())
    return found


def paragraphs(path: Path = R_DATA) -> list[str]:
    """The novels' paragraphs, without headings and the marks of italics."""
    found = []
    for serialised in objects(path.read_bytes()):
        text = "\n".join(lines(serialised))
        if LEFT_OUT in text[:200]:
            continue
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.replace("_", "").split())
            if re.search(r"[a-z].*[.?!]", words) and not re.match("chapter|volume", words, re.I):
                found.append(words)
    return found
