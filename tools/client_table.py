"""Give real clients every format, whole and streamed, and print a table of which can play it.

python tools/client_table.py [--only NAME ...] [--update docs/clients.md]

Starts a server with the built-in voice. A cell is `yes` if the client gets all of the speech: as
long as the same speech in PCM, within 0.1 s; in browsers, what reaches the audio graph counts. A
star has a remark below the table. Clients that cannot send POST get the same bytes, as they come,
from a relay that answers GET. Programs that are missing are left out, with a line that says so.
With `--update` the table replaces the one in a document.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "python"), str(ROOT / "tests" / "support")]

import client_browsers  # noqa: E402

import node_packages  # noqa: E402

TEXT = "Please take the second door on the left."
SEED = 5
FORMATS = ("wav", "mp3", "opus", "aac", "flac", "pcm", "ulaw")
RAW = {"pcm": ("s16le", 24_000, 2), "ulaw": ("mulaw", 8000, 1)}
"""ffmpeg's name, rate and bytes of a sample of formats without a header."""

TOLERANCE_S = 0.1
TIMEOUT_S = 60
BEGIN, END = "<!-- client table -->", "<!-- end of client table -->"

Cell = Callable[["Server", str, bool], float]
"""Gets a format, whole (False) or streamed (True), and returns the seconds that were played."""


class Unplayable(Exception):  # noqa: N818
    """A client cannot play a format, whoever sends it; the message says why."""


class Server:
    """A server with the built-in voice and a relay.

    Attributes:
        url, relay: their URLs.
        seconds: length of the speech.
        heard: the same without the silence around it.
        folder: for files.
        remark: what a client did besides playing all of it; empty for nothing.
    """

    def __init__(self, url: str, relay: str, folder: Path) -> None:
        self.url, self.relay, self.folder = url, relay, folder
        self.remark = ""
        pcm = self.speech("pcm", False)
        self.seconds, self.heard = pcm_seconds(pcm), client_browsers.heard_s(pcm)

    def body(self, name: str, streamed: bool) -> dict[str, object]:
        fields = {"model": "tts-1", "voice": "alloy", "input": TEXT, "seed": SEED}
        return {**fields, "response_format": name, "streaming": streamed}

    def speech(self, name: str, streamed: bool, **fields: object) -> bytes:
        with self.post(self.body(name, streamed) | fields) as answer:
            return answer.read()

    def post(self, body: dict[str, object]):
        return post(self.url, json.dumps(body).encode())

    def file(self, name: str, streamed: bool) -> Path:
        path = self.folder / f"{'streamed' if streamed else 'whole'}.{name}"
        path.write_bytes(self.speech(name, streamed))
        return path

    def link(self, name: str, streamed: bool) -> str:
        """An address at which the relay answers GET."""
        query = urllib.parse.urlencode({"body": json.dumps(self.body(name, streamed))})
        return f"{self.relay}/speech.{name}?{query}"


def post(url: str, body: bytes):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/audio/speech", body, headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


@contextmanager
def started() -> Iterator[Server]:
    """A server, a relay and a folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [
            sys.executable,
            "-m",
            "vox_serve.launch",
            "--port",
            "0",
            "--log_level",
            "warning",
        ]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.terminate)
        assert process.stdout is not None
        line = next(line for line in process.stdout if "ready at" in line)
        url = line.split(" ready at ")[1].split()[0]
        relay = ThreadingHTTPServer(("127.0.0.1", 0), relay_to(url))
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        stack.callback(relay.shutdown)
        yield Server(url, f"http://127.0.0.1:{relay.server_port}", folder)


def relay_to(url: str) -> type[BaseHTTPRequestHandler]:
    class Relay(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            if "body" not in query:
                return self.page()
            with post(url, query["body"][0].encode()) as answer:
                length = answer.headers.get("Content-Length")
                self.send_response(200)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.send_header(*(("Content-Length", length) if length else CHUNKED))
                self.send_header("Connection", "close")
                self.end_headers()
                while piece := answer.read1(65_536):
                    self.wfile.write(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
                    self.wfile.flush()
                if not length:
                    self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def page(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Relay


CHUNKED = ("Transfer-Encoding", "chunked")


def run(*command: object) -> bytes:
    """The output of a command."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, timeout=5 * TIMEOUT_S)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        raise RuntimeError(next((line for line in lines if "rror" in line), "it failed"))
    return done.stdout


def pcm_seconds(pcm: bytes) -> float:
    """The length of 24 kHz 16-bit samples."""
    return len(pcm) / 48_000


def with_pyav(content: bytes, name: str) -> float:
    import io

    import av

    if name in RAW:
        _, rate, size = RAW[name]
        return len(content) / size / rate
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.audio[0]
        return sum(frame.samples for frame in container.decode(stream)) / stream.rate


def openai_python(server: Server, name: str, streamed: bool) -> float:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    own = {"seed": SEED, "streaming": streamed}
    fields = {"model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": name}
    if not streamed:
        return with_pyav(client.audio.speech.create(**fields, extra_body=own).content, name)
    with client.audio.speech.with_streaming_response.create(**fields, extra_body=own) as answer:
        return with_pyav(b"".join(answer.iter_bytes()), name)


NODE_PROGRAM = """
import OpenAI from "openai";
const [url, body, streamed] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const answer = await client.audio.speech.create(JSON.parse(body));
if (streamed === "true") for await (const chunk of answer.body) process.stdout.write(chunk);
else process.stdout.write(Buffer.from(await answer.arrayBuffer()));
"""


def openai_node(server: Server, name: str, streamed: bool) -> float:
    if node_packages.why_missing("openai"):
        node_packages.install()
    program = node_packages.FOLDER / "speak.mjs"
    program.write_text(NODE_PROGRAM)
    body = json.dumps(server.body(name, streamed))
    return with_pyav(run("node", program, server.url, body, str(streamed).lower()), name)


def ffmpeg(server: Server, name: str, streamed: bool) -> float:
    kind = []
    if name in RAW:
        kind = ["-f", RAW[name][0], "-ar", str(RAW[name][1]), "-ac", "1"]
    source = [*kind, "-i", server.link(name, True) if streamed else server.file(name, False)]
    return pcm_seconds(run("ffmpeg", "-v", "error", *source, "-f", "s16le", "-ar", 24_000, "-"))


def gstreamer(server: Server, name: str, streamed: bool) -> float:
    source = ["filesrc", f"location={server.file(name, False)}"]
    if streamed:
        source = ["souphttpsrc", f"location={server.link(name, True)}"]
    decode = ["decodebin"]
    if name == "pcm":
        decode = ["rawaudioparse", "pcm-format=s16le", "sample-rate=24000", "num-channels=1"]
    elif name == "ulaw":
        decode = ["audio/x-mulaw,rate=8000,channels=1", "!", "mulawdec"]
    wanted = "audio/x-raw,format=S16LE,rate=24000,channels=1"
    target = server.folder / "gstreamer.pcm"
    convert = ["audioconvert", "!", "audioresample", "!", wanted]
    run("gst-launch-1.0", "-q", *source, "!", *decode, "!", *convert, "!", "filesink",
        f"location={target}")  # fmt: skip
    return pcm_seconds(target.read_bytes())


def vlc(server: Server, name: str, streamed: bool) -> float:
    if name == "ulaw":
        raise Unplayable("its demuxers of raw audio take no mu-law, or only at 44.1 kHz")
    source = server.link(name, True) if streamed else server.file(name, False)
    target = server.folder / "vlc.wav"
    target.unlink(missing_ok=True)
    kind = []
    if name == "pcm":
        kind = ["--demux=rawaud", "--rawaud-channels=1", f"--rawaud-samplerate={RAW[name][1]}",
                "--rawaud-fourcc=s16l"]  # fmt: skip
    transcode = "#transcode{acodec=s16l,channels=1,samplerate=24000}"
    output = f"--sout={transcode}:std{{access=file,mux=wav,dst={target}}}"
    command = ["cvlc", "-I", "dummy", "--no-video", *kind, source, output, "vlc://quit"]
    if os.geteuid():
        run(*command)
    else:  # VLC refuses to run as root
        server.folder.chmod(0o777)
        run("setpriv", "--reuid=65534", "--clear-groups", "env", f"HOME={server.folder}", *command)
    return pcm_seconds(target.read_bytes()[44:])


def program(*names: str) -> str | None:
    missing = [name for name in names if not shutil.which(name)]
    return f"needs {', '.join(missing)}" if missing else None


def try_cell(play: Cell, server: Server, name: str, streamed: bool) -> str:
    server.remark = ""
    try:
        seconds = play(server, name, streamed)
    except Unplayable as error:
        return f"-: {error}"
    except Exception as error:
        return f"no: {(str(error).splitlines() or [type(error).__name__])[-1][:120]}"
    if abs(seconds - server.seconds) > TOLERANCE_S:
        return f"no: {seconds:.2f} s of {server.seconds:.2f}"
    return f"yes: {server.remark}" if server.remark else "yes"


def parts_of(document: Path | None) -> tuple[str, str, str]:
    """The text before the table of a document, the table, and the text after it."""
    before, _, rest = (document.read_text() if document else "").partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of clients")
    parser.add_argument("--update", type=Path, help="the document with the table")
    args = parser.parse_args()
    with ExitStack() as stack:
        server = stack.enter_context(started())
        clients: dict[str, tuple[str | None, Cell]] = {
            "openai (Python)": (None, openai_python),
            "openai (Node)": (program("node", "npm"), openai_node),
            "ffmpeg": (program("ffmpeg"), ffmpeg),
            "GStreamer": (program("gst-launch-1.0"), gstreamer),
            "VLC": (program("cvlc"), vlc),
            **client_browsers.cells(stack, server.folder, RAW, TOLERANCE_S),
        }
        rows, notes, num_wrong = [], [], 0
        for client, (missing, play) in clients.items():
            if args.only and client not in args.only:
                continue
            if missing:
                notes.append(f"{client} was not run: {missing}.")
                continue
            cells = []
            for name in FORMATS:
                found = [try_cell(play, server, name, streamed) for streamed in (False, True)]
                cells.append(" / ".join(f.partition(":")[0] for f in found))
                cells[-1] += " *" * (cells[-1] == "yes / yes" and {*found} != {"yes"})
                for f in sorted({*found} - {"yes"}):
                    num_wrong += f.startswith("no")
                    notes.append(f"{client}, {name}: {f.partition(': ')[2]}.")
                print(f"{client:16} {name:5} {' / '.join(found)}", file=sys.stderr, flush=True)
            rows.append(f"| {client} | {' | '.join(cells)} |")
    names = " | ".join(f"`{name}`" for name in FORMATS)
    header = [f"| client | {names} |", "| --- " * (1 + len(FORMATS)) + "|"]
    before, old, after = parts_of(args.update)
    if args.only:  # the others stay
        kept = [line for line in old.splitlines() if not line.startswith(tuple(header))]
        is_new = tuple(f"{mark} {client}" for mark in "|-" for client in args.only)
        kept = [line for line in kept if not line.startswith(is_new)]
        rows += [line for line in kept if line.startswith("| ")]
        notes += [line.removeprefix("- ") for line in kept if line.startswith("- ")]
    table = "\n".join([*header, *rows, "", *(f"- {note}" for note in notes)]).rstrip()
    print(table)
    if args.update:
        args.update.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    return bool(num_wrong)


if __name__ == "__main__":
    sys.exit(main())
