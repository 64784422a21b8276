"""Keep voices for the server: add, list, remove or listen to them.

python -m vox_serve.voices add NAME --audio hello.wav --transcript "Hello." --voices DIR
python -m vox_serve.voices list --voices DIR
python -m vox_serve.voices preview NAME -o preview.wav --voices DIR
python -m vox_serve.voices remove NAME --voices DIR
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vox_serve.atomic_file import atomic_write
from vox_serve.cli import CommandError, CommandParser, one_line, run_command
from vox_serve.config import Config, ModelSettings, VoiceSettings
from vox_serve.console import standard_streams
from vox_serve.speech import make_engine
from vox_serve.text_bound import check_length

if TYPE_CHECKING:
    from vox_serve.voice_store import VoiceStore

PROG = "voices"
ACTIONS = ("add", "list", "remove", "preview")


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Keep voices for the server, in the folder of its --voices.",
        usage="vox-serve voices add|list|remove|preview [NAME] --voices DIR [flags]",
        epilog="To add a voice, give each recording with what it says: --audio a.wav --transcript "
        "'Hello.'; both may be repeated. Only voices of people who agreed may be added.",
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("name", nargs="?", help="the voice's name; all but list need it")
    parser.add_flag("audio", action="append", default=[], metavar="FILE", help="add: a recording")
    parser.add_flag(
        "transcript", action="append", default=[], metavar="TEXT", help="add: what it says"
    )
    parser.add_flag("speaker", type=int, default=0, help="add: id of the speaker [default 0]")
    parser.add_flag("replace", action="store_true", help="add: replace a voice of this name")
    parser.add_argument("-o", "--output", metavar="WAV", help="preview: the file to write")
    parser.add_settings(ModelSettings, VoiceSettings)
    return parser


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser()
    args, config = parser.parse(argv)
    if config.voices is None:
        parser.error("give --voices DIR")
    if (args.name is None) != (args.action == "list"):
        parser.error("list takes no name" if args.name else f"{args.action} needs a name")
    if args.action == "add" and not 0 < len(args.audio) == len(args.transcript):
        parser.error("give --audio FILE and --transcript TEXT, equally often")
    if args.action == "add" and not 0 <= args.speaker < 2**31:
        parser.error(f"--speaker must be 0 or more, got {args.speaker}")
    if (args.output is not None) != (args.action == "preview"):
        parser.error("preview needs -o out.wav, and the others take none")

    def command() -> int:
        if args.action == "add":
            recordings = list(zip(args.audio, args.transcript, strict=True))
            return _add(config, args.name, args.speaker, recordings, args.replace)
        store = _open(config)
        if args.action == "list":
            return _list(store)
        if args.action == "remove":
            store.remove(args.name)
            return 0
        return _preview(store, args.name, args.output)

    return run_command(PROG, command)


def _open(config: Config, must_exist: bool = True) -> "VoiceStore":
    from vox_serve.voice_store import VoiceStore

    assert config.voices is not None
    if must_exist and not Path(config.voices).is_dir():
        raise CommandError(f"there is no folder {config.voices}")
    return VoiceStore(config.voices, max_voices=config.max_voices)


def _add(
    config: Config, name: str, speaker: int, recordings: list[tuple[str, str]], replace: bool
) -> int:
    from vox_serve.voice_maker import VoiceMaker

    store = _open(config, must_exist=False)
    store.check_new(name, replace)
    for _, transcript in recordings:
        if not transcript.strip():
            raise CommandError("--transcript must not be blank")
        check_length(transcript, config.max_text_chars)
    alone = {"max_batch_size": 1, "context": "none", "prefix_cache_bytes": 0}
    engine = make_engine(config.model_copy(update=alone))
    maker = VoiceMaker(engine.mimi, engine.prompts)
    excerpts = [maker.excerpt(Path(path), transcript) for path, transcript in recordings]
    voice = maker.make(name, speaker, excerpts)
    store.add(voice, replace)
    seconds = sum(map(voice.seconds, voice.segments))
    print(f"{name}: {seconds:.1f} s in {store.folder}")
    return 0


def _list(store: "VoiceStore") -> int:
    from vox_serve.voice_file import VoiceError

    for key in store.names():
        try:
            voice = store.get(key)
        except VoiceError as error:
            print(one_line(f"{key}: {error}"))
            continue
        created = time.strftime("%Y-%m-%d", time.localtime(voice.created))
        seconds = sum(map(voice.seconds, voice.segments))
        text = " ".join(segment.text for segment in voice.segments)
        facts = f"{seconds:.1f} s, speaker {voice.speaker}, {created}"
        print(one_line(f"{voice.name}: {facts}: {text}"))
    return 0


def _preview(store: "VoiceStore", name: str, output: str) -> int:
    from vox_serve.audio import wav_file

    voice = store.get(name)
    with atomic_write(output) as file:
        file.write(wav_file(voice.preview.tobytes(), voice.sample_rate_hz))
    return 0


if __name__ == "__main__":
    sys.exit(main())
