"""Text-to-speech with CSM in Python, over HTTP and on the command line, on voxkern's kernels.

    import vox_serve
    voice = vox_serve.load("demo")
    audio = voice.say("Hello there.", speaker=0)
    for chunk in voice.stream("Hello there."): ...
    chat = voice.conversation()
    chat.hear("Can you help me?", "question.wav")
    audio = chat.say("Of course.")

`vox_serve.speech` documents `load` and `Voice`; it is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vox_serve.speech import SpeechCutWarning, Voice, load

__all__ = ["SpeechCutWarning", "Voice", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vox_serve' has no attribute {name!r}")
    from vox_serve import speech

    return getattr(speech, name)
