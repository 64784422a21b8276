"""A replica's conversations, of which the cluster's directory keeps a copy."""

import asyncio
import json
import logging
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import FastAPI, Request, Response

from vox_serve.cluster.directory import Claim, Key, State
from vox_serve.cluster.private_server import OWNER, RELEASE, Address, PrivateServer
from vox_serve.cluster.upstream import connect
from vox_serve.conversation_service import ConversationService
from vox_serve.conversations import Conversation, ConversationsFullError
from vox_serve.http_io import AsciiJSONResponse
from vox_serve.job import QueueFull

logger = logging.getLogger("vox_serve")

ASK_AGAIN_S = 0.1
GIVE_UP_S = 15.0
BEAT_S = 1.0
RELEASE_TIMEOUT_S = 5.0

_SAVED = tuple(
    field.name
    for field in fields(Conversation)
    if field.name
    not in ("max_positions", "last_used_s", "num_users", "is_deleted", "reply_until_s")
)


class ElsewhereError(Exception):
    """Another replica has the conversation, and answers in it now.

    Attributes:
        owner: its address.
    """

    def __init__(self, owner: Address) -> None:
        super().__init__("another replica answers in this conversation")
        self.owner = owner


class Keeper(Protocol):
    """The directory as a replica reaches it; each call may take long while it restarts."""

    async def claim(
        self, key: Key, asker: Sequence[Any], instead_of: Sequence[Any] | None
    ) -> Claim: ...
    async def save(self, key: Key, owner: Sequence[Any], state: State | None) -> bool: ...
    async def epoch(self) -> str: ...


class Home:
    """Brings conversations here when they are used, and tells the directory of their turns.

    Only the server's event loop uses it.

    Args:
        service: the replica's conversations.
        keeper: the directory.
        address: of the replica.
        model: a name of the model whose codes the conversations have, and of no other.
    """

    def __init__(
        self, service: ConversationService, keeper: Keeper, address: Address, model: str
    ) -> None:
        self._service, self._keeper = service, keeper
        self._address, self._model = address, model
        self._owned: weakref.WeakSet[Conversation] = weakref.WeakSet()
        self._held: Counter[Key] = Counter()  # requests that have fetched it, and use it soon
        self._saves: dict[Key, asyncio.Task[None]] = {}
        self._fetches: weakref.WeakValueDictionary[Key, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._epoch = ""
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after the directory. Call this on the server's event loop."""
        self._beating = asyncio.ensure_future(self._beat())

    @asynccontextmanager
    async def hold(self, client: str, key: str, waits: bool) -> AsyncIterator[None]:
        """Have the newest state of a conversation here within the block, if there is one.

        Args:
            client, key: of the conversation.
            waits: until no other replica answers in it.

        Raises:
            ElsewhereError: another replica answers in it now.
            QueueFull: the directory does not answer, or there is no room here.
        """
        name = client, key
        try:
            async with asyncio.timeout(GIVE_UP_S), self._fetching(name):
                if self._service.kept.find(*name) not in self._owned:
                    await self._fetch(name, waits)
        except TimeoutError:
            raise QueueFull(
                "the conversations of the cluster cannot be reached: try later"
            ) from None
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    def _fetching(self, name: Key) -> asyncio.Lock:
        """Held while a conversation is being fetched."""
        return self._fetches.setdefault(name, asyncio.Lock())

    async def _fetch(self, name: Key, waits: bool) -> None:
        instead_of: Address | None = None
        while True:
            claim = await self._keeper.claim(name, self._address, instead_of)
            if claim.owner is None:
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            owner = Address(*claim.owner)
            if owner == self._address:
                break
            if await released(owner, name):
                instead_of = owner
            elif waits:
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                raise ElsewhereError(owner)
        kept = self._service.kept
        conversation = kept.find(*name)  # what was here before it went elsewhere
        if claim.state is not None:
            try:
                conversation = conversation or kept.create(*name)
            except ConversationsFullError as error:
                raise QueueFull(f"{error}: try later") from None
            restore(conversation, claim.state, self._model, kept.clock())
            self._owned.add(conversation)
        elif conversation is not None and not conversation.num_users:  # it was deleted elsewhere
            kept.remove(*name)

    def changed(self, conversation: Conversation) -> None:
        """Save a conversation after a change, in the order of the changes."""
        name = conversation.client, conversation.id
        state = None
        if conversation.is_deleted:
            self._owned.discard(conversation)
        else:
            self._owned.add(conversation)
            state = snapshot(conversation, self._model, self._service.kept.clock())
        before = self._saves.get(name)
        saving = self._save(conversation, state, before)
        self._saves[name] = task = asyncio.ensure_future(saving)
        task.add_done_callback(lambda _: self._saves.get(name) is task and self._saves.pop(name))

    async def release(self, client: str, key: str) -> bool:
        """Give a conversation up for another replica; False while a request is in it."""
        name = client, key
        while not self._is_used(name) and (saving := self._saves.get(name)) is not None:
            await asyncio.wait((saving,))
        async with self._fetching(name):  # a claim may be on its way here
            if self._is_used(name):
                return False
            if self._service.kept.peek(*name) in self._owned:
                self._service.kept.remove(*name)
            return True

    def _is_used(self, name: Key) -> bool:
        conversation = self._service.kept.peek(*name)
        return name in self._held or (conversation is not None and conversation.num_users > 0)

    async def _save(
        self,
        conversation: Conversation,
        state: State | None,
        before: "asyncio.Task[None] | None",
    ) -> None:
        if before is not None:
            await asyncio.wait((before,))
        try:
            name = conversation.client, conversation.id
            if not await self._keeper.save(name, self._address, state):
                logger.warning("a conversation was taken over while a turn of it ended here")
                self._owned.discard(conversation)
        except Exception:  # the turn was spoken: the answer must not fail for this
            logger.exception("a conversation's turn cannot be saved")

    async def _beat(self) -> None:
        """Tell a directory that was started again about the conversations here."""
        while True:
            try:
                epoch = await self._keeper.epoch()
                if self._epoch and epoch != self._epoch:
                    for conversation in list(self._owned):
                        if not conversation.is_deleted:
                            self.changed(conversation)
                self._epoch = epoch
            except Exception as error:  # the loop must outlive every loss of the directory
                if self._epoch:  # else it is starting
                    logger.warning("the directory of conversations does not answer: %r", error)
            await asyncio.sleep(BEAT_S)


def snapshot(conversation: Conversation, model: str, now_s: float) -> State:
    """A conversation's state for another process.

    Args:
        conversation: whose state it is.
        model: whose codes it has.
        now_s: the time by the clock of the conversation's times.
    """
    state = {name: getattr(conversation, name) for name in _SAVED}
    state["turns"] = list(conversation.turns)
    ages = {"reply_left_s": conversation.reply_until_s - now_s, "saved_at": time.time()}
    return state | ages | {"model": model}


def restore(conversation: Conversation, state: State, model: str, now_s: float) -> None:
    """Give a conversation the state of `snapshot`. Turns of another model are forgotten: their
    codes would be other sounds, or none."""
    if state["model"] != model:
        num_forgotten = state["num_forgotten"] + len(state["turns"])
        state = state | {"turns": [], "num_forgotten": num_forgotten, "begin": 0}
        state |= {"reply_turns": 0, "reply_frames_forgotten": 0}
    for name in _SAVED:
        setattr(conversation, name, state[name])
    conversation.turns = list(state["turns"])
    conversation.reply_until_s = now_s + state["reply_left_s"] - (time.time() - state["saved_at"])


async def released(owner: Address, name: Key) -> bool:
    """Ask a conversation's owner for it; False if a request is in it, or if it does not answer in
    time: it lives, since it accepts. One that is gone has it no more."""
    client, key = (quote(part, safe="") for part in name)
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT_S):
            reader, writer = await connect(owner, RELEASE, (client, key))
            try:
                return (await reader.readline()) != b"no\n"
            finally:
                writer.close()
    except TimeoutError:
        return False
    except OSError:  # so is a `ReplicaLostError`
        return True


def add_home(server: PrivateServer, app: FastAPI, keeper: Keeper, model: str) -> None:
    """Let the conversations of a replica's server be those of the cluster.

    Args:
        server: not started yet.
        app: of the server.
        keeper: the directory.
        model: see `Home`.
    """
    home = Home(app.state.conversations, keeper, server.address, model)
    app.state.conversations.home = home
    server.release = home.release
    server.on_start = home.start

    async def elsewhere(_: Request, error: Exception) -> Response:
        assert isinstance(error, ElsewhereError)
        headers = {OWNER.decode(): json.dumps(error.owner)}
        return AsciiJSONResponse({"detail": str(error)}, 421, headers)

    app.add_exception_handler(ElsewhereError, elsewhere)
