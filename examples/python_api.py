"""Speak in Python: a whole text, then a stream.

python examples/python_api.py [model]
"""

import sys

import soundfile

import vox_serve


def main() -> None:
    voice = vox_serve.load(sys.argv[1] if len(sys.argv) > 1 else "demo")

    audio = voice.say("Hello there.", speaker=0, seed=1)
    soundfile.write("hello.wav", audio, voice.sample_rate_hz)
    print(f"hello.wav: {len(audio) / voice.sample_rate_hz:.2f} s")

    samples = 0
    for chunk in voice.stream("Please take the second door on the left.", speaker=1):
        samples += len(chunk)  # hand `chunk`, float32 at 24 kHz, to a sound device here
    print(f"streamed {samples / voice.sample_rate_hz:.2f} s")


if __name__ == "__main__":
    main()
