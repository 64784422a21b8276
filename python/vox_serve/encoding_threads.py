"""Runs encoders in threads of their own, so that they delay neither the event loop nor each other.

A codec takes about a millisecond for a frame of speech, most of it without Python's lock. A
response has one frame here at a time, so responses take turns, whatever their formats cost.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import HTTPException

from vox_serve.formats import Output

T = TypeVar("T")

MAX_THREADS = 8

LOAD_DELAY_S = 0.2

_starting = threading.Lock()


def _use_one_core() -> None:
    """Keep torch, which makes the watermark, from taking the engine's cores too."""
    if "vox_serve.watermark_net" not in sys.modules:
        return
    import torch

    with _starting:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of all that begin later
        others = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        others.start()
        others.join()


_threads = ThreadPoolExecutor(
    min(os.cpu_count() or 1, MAX_THREADS), "encoder", initializer=_use_one_core
)


def is_copied(output: Output) -> bool:
    """True if it has the samples as they are made."""
    return output.is_plain and output.format.name in ("wav", "pcm")


def is_costly(output: Output) -> bool:
    """True if a frame takes longer than the way to a thread and back.

    Another sample rate takes 0.05 ms, a codec or another speed 0.1 to 1.2 ms.
    """
    return output.format.is_compressed or output.speed != 1.0 or output.watermark


async def beside(output: Output, work: Callable[[], T]) -> T:
    """The result of work on one frame of an output; work that is costly runs in a thread.

    Raises:
        HTTPException: 501, if PyAV cannot be loaded.
    """
    try:
        if not is_costly(output):
            await asyncio.sleep(0)  # others go first: whole answers have many frames
            return work()
        return await asyncio.get_running_loop().run_in_executor(_threads, work)
    except ImportError as error:
        detail = f"this server cannot make {output.format.name}: {error}"
        raise HTTPException(501, detail) from None


def load_codecs() -> None:
    """Load PyAV in a thread once the server is ready, so that no compressed answer waits for it."""
    asyncio.get_running_loop().call_later(LOAD_DELAY_S, _threads.submit, _import)


def _import() -> None:
    try:
        from vox_serve import codec_encoders as codec_encoders
        from vox_serve import tempo as tempo
    except ImportError:  # an answer that needs it says so
        pass
