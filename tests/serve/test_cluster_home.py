"""The conversations of a replica, which move to other replicas, without servers."""

import asyncio
import contextlib
import gc
import socket
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from local_cluster import LocalKeeper
from vox_serve.cluster import home as home_module
from vox_serve.cluster.home import ElsewhereError, Home, released
from vox_serve.cluster.private_server import Address
from vox_serve.cluster.replica import model_name
from vox_serve.config import Config
from vox_serve.conversations import Conversations, Turn
from vox_serve.job import QueueFull

A, B = Address("h", 1, "a"), Address("h", 2, "b")
CALL = "me", "call"


class Keeper(LocalKeeper):
    """A directory whose answers to claims can be held back.

    Attributes:
        num_claims: by address.
        gate: claims are answered while it is set.
    """

    def __init__(self):
        super().__init__()
        self.num_claims = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    async def claim(self, key, asker, instead_of):
        self.num_claims[asker] += 1
        claim = await super().claim(key, asker, instead_of)
        await self.gate.wait()
        return claim


def make_home(keeper, address=A, model="m", max_number=10) -> Home:
    kept = Conversations(max_number, 3600.0, 512, lambda: 0.0)
    return Home(SimpleNamespace(kept=kept), keeper, address, model)


def turn(text: str) -> Turn:
    return Turn(0, text, np.zeros((2, 4), np.int16), True, 8)


async def begin(home: Home, *texts: str, key="call"):
    """Begin a conversation with some turns, and save it."""
    kept = home._service.kept
    conversation = kept.find("me", key) or kept.create("me", key, "anna")
    for text in texts:
        conversation.add(turn(text))
    home.changed(conversation)
    await asyncio.gather(*home._saves.values())
    return conversation


def texts(conversation) -> list[str]:
    return [t.text for t in conversation.turns]


@pytest.fixture
def replicas(monkeypatch):
    """The homes of the replicas that live, by their addresses; others are gone."""
    homes: dict[Address, Home] = {}

    async def ask(owner, name) -> bool:
        return owner not in homes or await homes[owner].release(*name)

    monkeypatch.setattr(home_module, "released", ask)
    return homes


def test_requests_at_the_same_time_fetch_a_conversation_once(replicas):
    async def run() -> None:
        keeper = Keeper()
        await begin(make_home(keeper, B), "one")
        home = make_home(keeper)
        seen = []

        async def use() -> None:
            async with home.hold(*CALL, waits=False):
                conversation = home._service.kept.get(*CALL)
                conversation.num_users += 1
                seen.append(conversation)
                await asyncio.sleep(0)

        keeper.gate.clear()
        using = [asyncio.ensure_future(use()) for _ in range(3)]
        await asyncio.sleep(0.01)
        keeper.gate.set()
        await asyncio.gather(*using)
        assert keeper.num_claims[A] == 2  # the owner's name, then the conversation
        assert len(set(map(id, seen))) == 1
        assert not seen[0].is_deleted
        assert texts(seen[0]) == ["one"]

    asyncio.run(run())


def test_two_replicas_do_not_both_begin_a_conversation(replicas):
    async def run() -> None:
        keeper = Keeper()
        replicas.update({A: make_home(keeper, A), B: make_home(keeper, B)})

        async def use(address: Address) -> str:
            try:
                async with replicas[address].hold(*CALL, waits=False):
                    await asyncio.sleep(0.01)
                    await begin(replicas[address], "one")
                    return "begun"
            except ElsewhereError as error:
                return f"at {error.owner.secret}"

        assert await asyncio.gather(use(A), use(B)) == ["begun", "at a"]

    asyncio.run(run())


def test_a_conversation_that_is_in_use_gets_its_newer_state_in_place(replicas):
    async def run() -> None:
        keeper = Keeper()
        here, there = make_home(keeper), make_home(keeper, B)
        conversation = await begin(here, "one")
        conversation.num_users = 1
        async with there.hold(*CALL, waits=False):  # to it, the first replica seemed gone
            await begin(there, "two")
        await begin(here, "lost")  # this save tells it so
        replicas[B] = there
        async with here.hold(*CALL, waits=False):
            assert here._service.kept.get(*CALL) is conversation
        assert not conversation.is_deleted
        assert texts(conversation) == ["one", "two"]

    asyncio.run(run())


def test_a_conversation_that_was_deleted_elsewhere_is_deleted_here(replicas):
    async def run() -> None:
        keeper = Keeper()
        here, there = make_home(keeper), make_home(keeper, B)
        conversation = await begin(here, "one")
        async with there.hold(*CALL, waits=False):
            there._service.kept.get(*CALL).is_deleted = True
            there.changed(there._service.kept.get(*CALL))
        await asyncio.gather(*there._saves.values())
        here._owned.discard(conversation)
        async with here.hold(*CALL, waits=False):
            assert here._service.kept.find(*CALL) is None

    asyncio.run(run())


def test_without_room_a_request_is_told_to_come_later(replicas):
    async def run() -> None:
        keeper = Keeper()
        await begin(make_home(keeper, B), "one")
        home = make_home(keeper, max_number=1)
        home._service.kept.create("me", "other").num_users = 1
        with pytest.raises(QueueFull, match="in use: try later"):
            async with home.hold(*CALL, waits=False):
                pass

    asyncio.run(run())


def test_a_conversation_stays_while_a_request_is_about_to_use_it(replicas):
    async def run() -> None:
        home = make_home(Keeper())
        await begin(home, "one")
        async with home.hold(*CALL, waits=False):
            assert not await home.release(*CALL)
        assert await home.release(*CALL)
        assert home._service.kept.find(*CALL) is None
        assert await home.release(*CALL)

    asyncio.run(run())


def test_a_conversation_is_not_given_up_while_it_is_on_its_way_here(replicas):
    async def run() -> None:
        keeper = Keeper()
        await begin(make_home(keeper, B), "one")
        home = make_home(keeper)

        async def use() -> None:
            async with home.hold(*CALL, waits=False):
                await used.wait()

        used = asyncio.Event()
        keeper.gate.clear()
        using = asyncio.ensure_future(use())
        await asyncio.sleep(0.01)
        releasing = asyncio.ensure_future(home.release(*CALL))
        await asyncio.sleep(0.01)
        assert not releasing.done()
        keeper.gate.set()
        assert not await releasing
        used.set()
        await using

    asyncio.run(run())


def test_a_conversation_is_given_up_after_its_last_save():
    async def run() -> None:
        keeper = Keeper()
        home = make_home(keeper)
        conversation = await begin(home, "one")
        conversation.add(turn("two"))
        home.changed(conversation)
        assert await home.release(*CALL)
        state = keeper.directory.claim(CALL, A, None).state
        assert [t.text for t in state["turns"]] == ["one", "two"]

    asyncio.run(run())


def test_an_owner_that_does_not_answer_is_not_gone(monkeypatch):
    monkeypatch.setattr(home_module, "RELEASE_TIMEOUT_S", 0.05)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        owner = Address("127.0.0.1", listener.getsockname()[1], "s")
        assert not asyncio.run(released(owner, CALL))
    assert asyncio.run(released(owner, CALL))


def test_turns_of_another_model_are_forgotten(replicas):
    async def run() -> None:
        keeper = Keeper()
        await begin(make_home(keeper, B), "one", "two")
        home = make_home(keeper, model="another")
        async with home.hold(*CALL, waits=False):
            conversation = home._service.kept.get(*CALL)
            assert texts(conversation) == conversation.reply == conversation.context(512) == []
            assert (conversation.voice, conversation.num_forgotten) == ("anna", 2)
            await begin(home, "three")
        home = make_home(keeper, B, "another")
        async with home.hold(*CALL, waits=False):
            assert texts(home._service.kept.get(*CALL)) == ["three"]

    asyncio.run(run())


def test_a_home_forgets_conversations_with_their_replica():
    async def run() -> None:
        home = make_home(Keeper(), max_number=3)
        for number in range(20):
            await begin(home, key=str(number))
        gc.collect()
        assert len(home._owned) == 3
        assert not home._saves

    asyncio.run(run())


def test_a_model_has_a_name_of_its_own():
    def name(seed=0, dtype=torch.float32, **settings) -> str:
        return model_name(Config(**({"model": "m"} | settings)), engine_of(seed, dtype))

    assert name() == name(dtype=torch.bfloat16)
    names = {name(), name(seed=1), name(model="n"), name(adapter="a")}
    assert len(names) == 4


def engine_of(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        table: torch.randn(70, 4, generator=generator).to(dtype)
        for table in ("audio_table", "code0_head")
    }
    quantizer = SimpleNamespace(table=torch.randn(70, 4, generator=generator))
    return SimpleNamespace(
        model=SimpleNamespace(weights=SimpleNamespace(**weights)),
        mimi=SimpleNamespace(quantizer=quantizer),
    )
