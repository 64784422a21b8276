import pytest

from vox_serve.fair_queue import FairQueue, LineFull


def queue_of(*items: str, num_places: int = 1, max_items: int = 99) -> FairQueue[str]:
    """A queue of ready items; an item's client is its first letter."""
    queue: FairQueue[str] = FairQueue(num_places, max_items)
    for item in items:
        add(queue, item)
    return queue


def add(queue: FairQueue[str], item: str) -> str | None:
    evicted = queue.put(item, item[0])
    queue.mark_ready(item)
    return evicted


def served(queue: FairQueue[str]) -> list[str]:
    """All items in the order in which a single place serves them."""
    order = []
    while (item := queue.take()) is not None:
        order.append(item)
        queue.remove(item)
    return order


def test_one_client_is_served_in_order():
    assert served(queue_of("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_clients_take_turns():
    queue = queue_of("a1", "a2", "a3", "b1", "c1", "b2")
    assert served(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_newcomer_waits_for_one_turn_of_a_flood_not_for_all_of_it():
    queue = queue_of(*(f"a{i}" for i in range(50)))
    first = queue.take()
    add(queue, "b1")
    queue.remove(first)
    assert queue.take() == "b1"


def test_a_flood_of_new_clients_starves_nobody():
    queue = queue_of("a1", "a2")
    order = []
    for item in ("b1", "c1", "d1", "e1"):
        add(queue, item)
        order.append(queue.take())
        queue.remove(order[-1])
    assert order == ["a1", "b1", "c1", "a2"]


def test_the_client_with_the_fewest_places_comes_first():
    queue = queue_of("a1", "a2", "b1", "b2", num_places=3)
    assert [queue.take(), queue.take()] == ["a1", "b1"]
    queue.remove("a1")
    assert [queue.take(), queue.take()] == ["a2", "b2"]
    queue = queue_of("a1", "a2", "a3", num_places=2)
    assert [queue.take(), queue.take()] == ["a1", "a2"]
    add(queue, "b1")
    queue.remove("a1")
    assert queue.take() == "b1"


def test_no_more_are_placed_than_there_are_places():
    queue = queue_of("a1", "b1", "c1", num_places=2)
    assert [queue.take() for _ in range(3)] == ["a1", "b1", None]
    assert (queue.num_placed, queue.num_waiting, len(queue)) == (2, 1, 3)
    assert not queue.can_take
    queue.remove("b1")
    assert queue.can_take
    assert queue.take() == "c1"


def test_an_item_that_is_not_ready_delays_no_other():
    queue = queue_of()
    queue.put("a1", "a")
    queue.put("a2", "a")
    assert queue.take() is None
    queue.mark_ready("a2")
    assert queue.take() == "a2"
    queue.remove("a2")
    queue.mark_ready("a1")
    assert queue.take() == "a1"


def test_items_go_in_the_order_of_arrival_not_of_readiness():
    queue = queue_of()
    for item in ("a1", "a2", "a3"):
        queue.put(item, "a")
    for item in ("a3", "a1", "a2"):
        queue.mark_ready(item)
    assert served(queue) == ["a1", "a2", "a3"]


def test_a_removed_item_is_never_taken():
    queue = queue_of("a1", "a2")
    queue.remove("a1")
    queue.remove("a1")
    queue.mark_ready("a1")
    assert served(queue) == ["a2"]
    assert (len(queue), queue.num_placed, queue.num_waiting) == (0, 0, 0)
    assert queue._shares == {}
    assert queue._clients == {}


def test_a_full_line_refuses_its_own_clients():
    queue = queue_of("a1", "a2", max_items=2)
    for item in ("a3", "a4"):
        with pytest.raises(LineFull):
            queue.put(item, "a")
    assert served(queue) == ["a1", "a2"]


def test_without_a_line_nobody_waits():
    queue = queue_of("a1", max_items=1)
    with pytest.raises(LineFull):
        queue.put("b1", "b")


def test_a_newcomer_evicts_the_newest_of_the_client_with_the_most():
    queue = queue_of("a1", "a2", "b1", "a3", "b2", max_items=5)
    assert add(queue, "c1") == "a3"
    with pytest.raises(LineFull):  # 2, 2 and 1: an eviction would only swap the roles
        add(queue, "c2")
    assert served(queue) == ["a1", "b1", "c1", "a2", "b2"]


def test_places_count_as_held_but_are_never_evicted():
    queue = queue_of("a1", "a2", "a3", num_places=2, max_items=3)
    queue.take(), queue.take()
    assert add(queue, "b1") == "a3"
    with pytest.raises(LineFull):
        add(queue, "c1")
    queue = queue_of("a1", "a2", num_places=2, max_items=2)
    queue.take(), queue.take()
    with pytest.raises(LineFull):
        add(queue, "b1")


def test_emptying_the_line_keeps_the_places():
    queue = queue_of("a1", "b1", "a2")
    queue.put("c1", "c")
    assert queue.take() == "a1"
    assert sorted(queue.remove_waiting()) == ["a2", "b1", "c1"]
    assert (queue.num_placed, queue.num_waiting) == (1, 0)
    assert "a1" in queue


def test_a_spare_place_is_for_a_client_that_holds_none():
    queue: FairQueue[str] = FairQueue(2, 99, num_spare=1)
    for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
        add(queue, item)
    queue.remove("b1")
    queue.remove("c1")
    queue.remove("b2")
    assert [queue.take(), queue.take(), queue.take()] == ["a1", "a2", None]
    add(queue, "b1")
    add(queue, "b2")
    assert queue.can_take
    assert [queue.take(), queue.take()] == ["b1", None]
    queue.remove("a1")
    assert queue.take() is None
    queue.remove("a2")
    assert queue.take() == "a3"


def test_a_client_that_begins_has_one_place():
    queue = queue_of("a1", "a2", "b1", num_places=3)
    places = [(item := queue.take(), queue.holds_one_place(item)) for _ in range(3)]
    assert places == [("a1", True), ("b1", True), ("a2", False)]


def test_an_item_that_is_not_accepted_is_passed_over():
    queue = FairQueue(2, 9)
    for item, client in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        queue.put(item, client)
        queue.mark_ready(item)
    assert queue.peek() == "a1"
    assert queue.peek(lambda item: item != "a1") == "a2"
    assert queue.peek(lambda item: item == "b1") == "b1"
    assert queue.peek(lambda item: False) is None
    assert queue.take("b1") == "b1"
    assert not queue.is_waiting("b1")
    assert queue.is_waiting("a1")
    assert queue.take() == "a1"


def test_items_ahead_of_a_new_one():
    """A client that waits for much is not ahead of one that has nothing."""
    queue = FairQueue(1, 20)
    for i in range(5):
        queue.put(f"a{i}", "a")
        queue.mark_ready(f"a{i}")
    assert queue.take() == "a0"
    assert queue.num_ahead("a") == 4
    assert queue.num_ahead("b") == 0
    queue.put("b0", "b")
    assert queue.num_ahead("b") == 2  # its own, and one of the other's
    assert queue.num_ahead("c") == 1
