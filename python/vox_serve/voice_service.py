"""The server's voices: the model's two speakers, and those that were added."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from vox_serve import voice_store
from vox_serve.config import Config
from vox_serve.context_field import ContextLimits, decode_context
from vox_serve.context_segment import SegmentFields, speech_bytes
from vox_serve.http_io import MAX_JSON_BYTES, BodyMemory, Upload, media_type
from vox_serve.job import QueueFull, RequestRefused, ShuttingDown
from vox_serve.prompt import Segment
from vox_serve.runner import SHUTTING_DOWN, Runner
from vox_serve.voice_file import Voice, VoiceError
from vox_serve.voice_maker import Excerpt, VoiceMaker
from vox_serve.voice_store import (
    StoreBusyError,
    UnknownVoiceError,
    VoiceStore,
    is_speaker,
    shown_names,
)

if TYPE_CHECKING:
    from vox_serve.request import Request as SpeechRequest

logger = logging.getLogger("vox_serve")

T = TypeVar("T")

MAX_UPLOADS_PER_CLIENT = 1
UPLOAD_MEMORY = 4
"""Memory of all uploads, read or waiting to be encoded, in multiples of the longest."""

CONTEXT_BYTES = 2**26
"""Most memory of all requests' contexts, read or waiting to be encoded."""

REST_SHARE = 2.0
"""While requests are spoken, encoding rests for this many times the time that it worked."""


class VoiceService:
    """Finds voices for requests, and makes new ones beside live speech.

    Args:
        runner: runs the engine.
        config: the settings.

    Attributes:
        store: the voices that were added.
        maker: makes them.

    Raises:
        VoiceError: the folder of `config.voices` cannot be used.
    """

    def __init__(self, runner: Runner, config: Config) -> None:
        self._runner = runner
        self._max_speaker = config.speaker_limit
        self.maker = VoiceMaker(runner.engine.mimi, runner.engine.prompts)
        self.store = VoiceStore(config.voices, self.maker.sizes, config.max_voices)
        self._limits = ContextLimits(
            config.max_upload_bytes, self.maker.max_context_s, config.max_text_chars
        )
        self._bodies = BodyMemory(UPLOAD_MEMORY * config.max_upload_bytes)
        self._contexts = BodyMemory(max(CONTEXT_BYTES, config.max_body_bytes))
        self._uploads: Counter[str] = Counter()  # by client; used on the event loop alone
        self._removing = asyncio.Lock()  # a removal may wait for long: it gets one thread
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Give up what is being encoded."""
        self._stopped.set()

    async def request_in(
        self, request: "SpeechRequest", name: str | None, speaker: int | None = None
    ) -> "SpeechRequest":
        """A request to speak in a voice; the request itself if there is no name.

        Args:
            request: the request.
            name: of the voice.
            speaker: the speaker that the client gives too, which must be the voice's.

        Raises:
            UnknownVoiceError: there is no such voice.
            RequestRefused: it cannot be used, or has another speaker.
        """
        if name is None:
            return request
        if is_speaker(name, self._max_speaker):
            spoken = replace(request, speaker=int(name))
        else:
            try:
                voice = await asyncio.to_thread(self.store.get, name)
            except UnknownVoiceError as error:
                keys = await asyncio.to_thread(self.store.names)
                names = shown_names(keys, self._max_speaker)
                raise UnknownVoiceError(f"{error}; there are {names}") from None
            except VoiceError as error:
                raise RequestRefused(str(error)) from None
            spoken = replace(request, speaker=voice.speaker, context=voice.segments)
        if speaker not in (None, spoken.speaker):
            raise RequestRefused(
                f"speaker is {speaker}, but voice {name} has speaker {spoken.speaker}: give the "
                "voice alone"
            )
        return spoken

    @contextmanager
    def upload(self, client: str) -> Iterator[Callable[[int], None]]:
        """Count an upload until the end of the block; yield what counts its bytes (see
        `BodyMemory.hold`).

        Raises:
            QueueFull: another one of this client is being read or encoded.
        """
        if self._uploads[client] >= MAX_UPLOADS_PER_CLIENT:
            raise QueueFull("another upload of this client is not finished: try later")
        self._uploads[client] += 1
        try:
            with self._bodies.hold(client) as count:
                yield count
        finally:
            self._uploads[client] -= 1
            if not self._uploads[client]:
                del self._uploads[client]

    def hold_context(self, client: str) -> AbstractContextManager[Callable[[int], None]]:
        """Count the memory of a context; see `BodyMemory.hold`."""
        return self._contexts.hold(client)

    def large_body(
        self, request: Request, stack: ExitStack, client: str, *names: str, file: str | None = None
    ) -> Upload:
        """The bound of a body with a context in some of its fields.

        Args:
            request: whose body it is.
            stack: counts the body until its end.
            client: who sends it.
            names: of the fields.
            file: see `Upload`.
        """
        has_files = file is not None and media_type(request) == "multipart/form-data"
        return Upload(
            tuple(name.encode() for name in names),
            min(self._limits.max_bytes, CONTEXT_BYTES if has_files else MAX_JSON_BYTES),
            lambda: stack.enter_context(self.hold_context(client)),
            file,
        )

    async def make(
        self,
        name: str,
        speaker: int,
        read: Callable[[Callable[[], object]], Sequence[Excerpt]],
        client: str,
        replace: bool = False,
    ) -> Voice:
        """Make a voice of recordings and keep it. One is made at a time, and slower while requests
        are spoken.

        Args:
            name, speaker: of the voice.
            read: decodes the recordings; calls its argument before each, which may raise to give
                up.
            client: whose voice it is, for fairness.
            replace: it may replace one of the same name.

        Raises:
            VoiceError, OSError: see `VoiceStore.add`, `VoiceMaker.make` and `read`.
            ShuttingDown: the server ends.
        """
        await asyncio.to_thread(self.store.check_new, name, replace)

        def work(pause: Callable[[float], None]) -> Voice:
            voice = self.maker.make(name, speaker, read(partial(pause, 0)), pause)
            pause(0)
            self.store.add(voice, replace)
            return voice

        return await self._beside(work, client)

    async def remove(self, name: str) -> None:
        """Forget a voice.

        Raises:
            VoiceError, OSError: see `VoiceStore.remove`.
        """
        try:
            await asyncio.wait_for(self._removing.acquire(), voice_store.LOCK_TIMEOUT_S)
        except TimeoutError:
            raise StoreBusyError from None
        try:
            await asyncio.to_thread(self.store.remove, name)
        finally:
            self._removing.release()

    async def read_context(self, segments: Sequence[SegmentFields], client: str) -> list[Segment]:
        """Decode and encode the speech of a request's context; recordings as in `make`.

        Raises:
            ContextError: see `decode_context` and `VoiceMaker.segments`.
            HTTPException: 429, if the contexts of all requests take too much memory.
            ShuttingDown: the server ends.
        """
        maker = self.maker

        def work(pause: Callable[[float], None]) -> list[Segment]:
            sizes = maker.prompts.config, maker.mimi.config
            turns = decode_context(segments, *sizes, self._limits, partial(pause, 0))
            return maker.segments(turns, pause)

        with self.hold_context(client) as count:
            count(speech_bytes(segments))
            if any(fields.kind == "audio" for fields in segments):
                return await self._beside(work, client)
            return await asyncio.to_thread(work, self._pause)

    def _pause(self, worked_s: float) -> None:
        is_live = self._runner.count_jobs()[0] > 0
        if self._stopped.wait(REST_SHARE * worked_s if is_live else 0) or self._runner.draining:
            raise ShuttingDown(SHUTTING_DOWN)

    async def _beside(self, work: Callable[[Callable[[float], None]], T], client: str) -> T:
        """The result of work in the thread that encodes; it gets a `pause` (see `VoiceMaker`),
        which gives up when nobody waits for the result any more."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        waiting = [work]  # its recordings are given up with the request, not when its turn comes

        def pause(worked_s: float) -> None:
            if future.cancelled():
                raise asyncio.CancelledError
            self._pause(worked_s)

        def run() -> None:
            post: Callable[[], Any]
            try:
                begun = waiting.pop()
            except IndexError:  # nobody wants the result
                return
            try:
                post = partial(_settle, future, begun(pause), None)
            except BaseException as error:
                post = partial(_settle, future, None, error)
            try:
                loop.call_soon_threadsafe(post)
            except RuntimeError:  # the loop is closed
                logger.warning("a voice was made after the server's end")

        try:
            self._runner.start_encoding(run, client)
        except RuntimeError:
            raise QueueFull("the system has no thread left: try later") from None
        try:
            return await future
        finally:
            waiting.clear()


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
