"""The line of a conversation's requests, beyond what the routes' tests see."""

import asyncio

import pytest

from vox_serve import conversation_line
from vox_serve.conversation_line import ConversationLine
from vox_serve.http_io import BodyMemory


def test_a_request_cancelled_as_it_gets_the_lock_gives_it_back(monkeypatch):
    async def locks_and_is_cancelled(receive, waiting):
        await waiting
        raise asyncio.CancelledError

    async def scenario() -> None:
        line = ConversationLine(BodyMemory(1000))
        with monkeypatch.context() as patch:
            patch.setattr(conversation_line, "unless_gone", locks_and_is_cancelled)
            with pytest.raises(asyncio.CancelledError):
                await line.enter("a", asyncio.Event().wait, 10)
        assert line.num_members == 0
        await asyncio.wait_for(line.enter("a", asyncio.Event().wait, 10), 5)
        line.leave()

    asyncio.run(scenario())
