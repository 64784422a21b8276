"""Say a text into an audio file, without a server.

python -m vox_serve.say "Hello." -o hello.wav
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from vox_serve.atomic_file import atomic_write, sync
from vox_serve.cli import CommandError, CommandParser, run_command
from vox_serve.config import (
    Config,
    ModelSettings,
    OutputSettings,
    SpeechSettings,
    VoiceSettings,
)
from vox_serve.console import discard_stdout, standard_streams
from vox_serve.formats import (
    FORMATS,
    MAX_SPEED,
    MIN_SPEED,
    FormatError,
    Output,
    format_of_ending,
)
from vox_serve.provenance import note_of
from vox_serve.say_text import read_text, text_problem
from vox_serve.speakers import known_speakers
from vox_serve.speech import make_engine

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.engine import Engine, Request
    from vox_serve.long_form import LongForm
    from vox_serve.player import Player
    from vox_serve.request import FinishReason, FrameOutput, Prompt

PROG = "say"

MAX_SPEECH_BYTES = 2**24
"""Speech that is kept in memory until it is written: 6 minutes."""


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Say a text into a mono audio file: 24 kHz WAV, or the format of its ending.",
        usage='vox-serve say ["text"] -o out.wav [flags]',
    )
    parser.add_argument("text", nargs="?", help="text to say; read from stdin if not given")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the text from a UTF-8 file")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write; - is stdout")
    parser.add_flag(
        "format", choices=[*FORMATS], help="format of the file [default by its ending, else wav]"
    )
    parser.add_flag("sample_rate", type=int, metavar="HZ", help="sample rate of wav or pcm")
    parser.add_flag("speed", type=float, default=1.0, help="tempo, 0.25 to 4 [default 1]")
    parser.add_flag("codes", metavar="NPY", help="write the frames too, int64 [N, K]; - is stdout")
    parser.add_flag("speaker", type=int, metavar="N", help="id of the speaker [default 0]")
    parser.add_flag("voice", metavar="NAME", help="a voice of the folder --voices, or a speaker")
    parser.add_flag(
        "conversation",
        metavar="JSON",
        help="a file of earlier turns, like --context's, to which the new one is added",
    )
    parser.add_flag("play", action="store_true", help="play the speech while it is made")
    parser.add_flag("greedy", action="store_true", help="same as --temperature 0")
    parser.add_settings(ModelSettings, SpeechSettings, OutputSettings, VoiceSettings)
    return parser


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser()
    args, config = parser.parse(argv)
    if args.text is not None and args.file is not None:
        parser.error("give a text or --file")
    if args.output is None and args.codes is None and not args.play:
        parser.error("give -o out.wav or --play")
    if args.output is not None and args.codes is not None and _same_file(args.output, args.codes):
        parser.error("-o and --codes name the same file")
    if args.speaker is not None and args.voice is not None:
        parser.error("--voice has its speaker: give it or --speaker")
    if num_speakers := known_speakers(config.model):
        config = config.for_speakers(num_speakers)
    if args.speaker is not None and not 0 <= args.speaker <= config.speaker_limit:
        parser.error(
            f"--speaker: must be 0 to {config.speaker_limit}, which --max_speaker changes, got "
            f"{args.speaker}"
        )
    if args.greedy and config.temperature and "temperature" in args:
        parser.error("--greedy is --temperature 0: give one of the two")
    if args.greedy:
        config = config.model_copy(update={"temperature": 0.0})

    try:
        name = args.format or format_of_ending(args.output or "") or "wav"
        sound = Output.of(name, args.sample_rate, args.speed, config.watermark)
    except FormatError as error:
        parser.error(str(error))
    if not MIN_SPEED <= sound.speed <= MAX_SPEED:
        parser.error(f"--speed must be {MIN_SPEED:g} to {MAX_SPEED:g}")

    def command() -> int:
        limit = config.max_text_chars
        text = read_text(args.text, args.file, limit)
        if problem := text_problem(text, limit):
            parser.error(problem)
        note = note_of(config.model) if args.format or name != "wav" else None
        return _say(text, args, config, sound, note)

    return run_command(PROG, command)


def _same_file(a: str, b: str) -> bool:
    """True if two outputs (`-` is stdout) are one file, whatever their spellings and links."""
    if a == b == "-":
        return True
    statuses = []
    for path in (a, b):
        try:
            statuses.append(os.fstat(1) if path == "-" else os.stat(path))
        except OSError:  # most often, it does not exist yet
            return "-" not in (a, b) and os.path.realpath(a) == os.path.realpath(b)
    return os.path.samestat(*statuses) and not os.path.samestat(statuses[0], os.stat(os.devnull))


def _say(
    text: str, args: argparse.Namespace, config: Config, sound: Output, note: str | None
) -> int:
    """Speak, and write the files; `sound` and `note` as in `encode_file`."""
    speaker, voice, output, codes_path = args.speaker or 0, args.voice, args.output, args.codes
    turns_path = Path(args.conversation) if args.conversation is not None else None
    # Fail before the long work, not after it.
    if turns_path is not None:
        _check_writable(turns_path)
    for path in (output, codes_path):
        if path == "-" and sys.stdout is None:
            raise CommandError("stdout is closed")
        if path is not None and path != "-":
            _check_writable(Path(path))
    if sound.watermark:
        from vox_serve.watermark_net import check_installed

        check_installed()
    player = _open_player(sound) if args.play else None

    from vox_serve.voice_file import Sizes
    from vox_serve.voice_store import find_voice

    if voice is not None:
        find_voice(voice, config.voices, max_speaker=config.speaker_limit)

    import numpy as np

    from vox_serve import turns_file
    from vox_serve.audio import pcm16, wav_header
    from vox_serve.encoded_file import encode_file
    from vox_serve.ending import why_cut
    from vox_serve.engine import Request
    from vox_serve.progress import Progress

    engine = make_engine(config.model_copy(update={"max_batch_size": 1}), keeps_one=True)
    context = None
    if voice is not None:
        sizes = Sizes.of(engine.prompts.config)
        speaker, segments = find_voice(voice, config.voices, sizes, config.speaker_limit)
        if segments:
            named = engine.default_context if config.context is not None else ()
            context = [*segments, *named]
    num_fixed = len(context or ())
    if turns_path is not None:
        chars = config.max_text_chars
        turns = turns_file.load_turns(turns_path, engine.mimi, engine.prompts.config, chars)
        before = engine.default_context if context is None else context
        num_fixed, context = len(before), [*before, *turns] if turns else context
    request = Request(
        text=text,
        speaker=speaker,
        context=context,
        sampling=config.sampling,
        max_frames=config.frames_for(text),
        normalise=config.normalise,
    )
    request, prompt, num_left_out = turns_file.fitting(engine, request, num_fixed)
    if num_left_out:
        print(f"{PROG}: warning: the first {num_left_out} turns do not fit", file=sys.stderr)
    part_frames: Counter[int] = Counter()
    with (
        ExitStack() as files,
        # A book's speech would fill the memory. The output's disk must hold it anyway.
        tempfile.SpooledTemporaryFile(MAX_SPEECH_BYTES, dir=_folder_of(output)) as pcm,
        Progress(len(prompt.parts), request.max_frames) as progress,
    ):
        if player is not None:
            files.enter_context(player)

        def take(frame: "FrameOutput", audio: "np.ndarray") -> None:
            data = pcm16(audio).tobytes()
            if player is not None:
                player.feed(data)
            try:
                pcm.write(data)
            except OSError as error:
                raise CommandError(f"cannot write {output}: {error.strerror}") from None
            part_frames[frame.part] += 1
            progress.frame(frame.part)

        _, codes, reason = speak(engine, request, prompt, take)
        progress.end()
        if cut := why_cut(reason, len(codes)):
            print(f"{PROG}: warning: {cut}", file=sys.stderr)
        contents: list[tuple[str, list[IO[bytes]]]] = []
        if codes_path is not None:
            npy = io.BytesIO()
            np.save(npy, codes)
            contents.append((codes_path, [npy]))
        if output is not None:
            if note is None and sound.is_plain:
                header = io.BytesIO(wav_header(pcm.tell(), engine.sample_rate_hz))
                contents.append((output, [header, pcm]))
            else:
                encoded = encode_file(pcm, sound, note, _folder_of(output))
                contents.append((output, [files.enter_context(encoded)]))
        _write(contents)
        if turns_path is not None:
            spoken = turns_file.turns_of(engine, request, prompt, codes, part_frames)
            turns_file.append_turns(turns_path, spoken)
    return 0


def _open_player(sound: Output) -> "Player":
    from vox_serve.encoders import open_shaper
    from vox_serve.player import Player

    return Player(open_shaper(Output.of("pcm", None, sound.speed, sound.watermark)))


def _write(contents: list[tuple[str, list[IO[bytes]]]]) -> None:
    """Write each path's contents, one after another, to it, or to stdout for `-`. Files are
    replaced only when all are on disk."""
    with ExitStack() as files:
        written = []
        for path, parts in contents:
            if path != "-":
                written.append((files.enter_context(_replacing(path)), parts))
        for file, parts in written:
            _copy(parts, file)
            sync(file)
        for path, parts in contents:
            if path == "-":
                _write_stdout(parts)


def _folder_of(output: str | None) -> str | None:
    """The folder of an output that is a file, if it takes new files."""
    if output is None or output == "-":
        return None
    path = Path(os.path.realpath(output))
    is_special = path.exists() and not path.is_file()
    return None if is_special or not os.access(path.parent, os.W_OK) else str(path.parent)


def _copy(parts: list[IO[bytes]], file: IO[bytes]) -> None:
    for part in parts:
        part.seek(0)
        shutil.copyfileobj(part, file)


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    try:
        with atomic_write(path) as file:
            yield file
    except BrokenPipeError:  # a fifo, or /dev/stdout
        raise
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def _write_stdout(parts: list[IO[bytes]]) -> None:
    try:
        _copy(parts, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise CommandError(f"cannot write stdout: {error.strerror}") from None


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder")
    if path.exists():  # not its folder: that of /dev/stdout holds no file of this name
        if not os.access(path, os.W_OK):
            raise CommandError(f"cannot write {path}: permission denied")
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


class Speech(NamedTuple):
    """A spoken request.

    Attributes:
        audio: `[S]` float32 samples; S may be 0.
        codes: `[N, K]` int64 frames; N may be 0.
        finish_reason: why it ended.
    """

    audio: "np.ndarray"
    codes: "np.ndarray"
    finish_reason: "FinishReason"


def speak(
    engine: "Engine | LongForm",
    request: "Request",
    prompt: "Prompt | None" = None,
    take: "Callable[[FrameOutput, np.ndarray], object] | None" = None,
) -> Speech:
    """Run one request to its end on an idle engine.

    Args:
        engine: the engine, without other requests.
        request: the request to run.
        prompt: the engine's `prepare` of it; None to prepare it here.
        take: gets each frame and its samples; the speech then has no samples.

    Returns:
        The speech; if it was cut, its last 10 ms are faded out.

    Raises:
        ValueError: the engine rejects the request.
        CommandError: the model produced numbers that are not finite.
    """
    import numpy as np

    from vox_serve.ending import delivered_audio

    engine.add(request, prompt)
    reason: FinishReason | None = None
    audio = [np.zeros(0, np.float32)]
    # A tensor kept for each frame would leave gaps in the heap: 0.2 MB a frame after four minutes.
    codes = array("q")
    while engine.has_work:
        for output in engine.step():
            reason = output.finish_reason
            if reason == "error":
                raise CommandError(output.error)
            delivered = delivered_audio(output)
            if output.codes is not None and delivered is not None:
                codes.extend(output.codes.tolist())
                if take is None:
                    audio.append(delivered)
                else:
                    take(output, delivered)
    all_codes = np.array(codes, np.int64).reshape(-1, engine.num_codebooks)
    return Speech(np.concatenate(audio), all_codes, reason or "stop")


if __name__ == "__main__":
    sys.exit(main())
