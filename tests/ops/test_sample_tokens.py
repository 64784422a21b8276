import math

import pytest
import torch
from torch import Tensor

from op_cases.sample_tokens import arguments, mixed_parameters
from ops_testing import DTYPES, opcheck, reference
from voxkern import ops
from voxkern.reference import sample_tokens as specification

VOCAB_SIZE = 2051
INF = float("inf")


def draw(target, logits: Tensor, **parameters) -> Tensor:
    return target.run("sample_tokens", *arguments(logits, **parameters))


# A second implementation of the documented rules, one code at a time, in plain Python numbers.


def philox(counter: list[int], key: list[int]) -> list[int]:
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (two >> 32) ^ b ^ low,
            two % 2**32,
            (one >> 32) ^ d ^ high,
            one % 2**32,
        )
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def kept_codes(scaled: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    kept = set(range(len(scaled)))
    if 0 < top_k < len(scaled):
        kth = sorted(scaled, reverse=True)[top_k - 1]
        kept = {i for i in kept if scaled[i] >= kth}
    largest = max(scaled)
    odds = {i: math.exp(scaled[i] - largest) for i in kept}
    if top_p < 1:
        limit = top_p * math.fsum(odds.values())
        above = {
            value: math.fsum(odds[j] for j in kept if scaled[j] > value)
            for value in {scaled[i] for i in kept}
        }
        kept = {i for i in kept if above[scaled[i]] < limit or scaled[i] == largest}
    return {i for i in kept if odds[i] >= min_p}


def by_hand(args: tuple, row: int) -> int:
    logits, temperature, top_k, top_p, min_p, penalty, history, seeds, frames, codebook = args
    row_logits = logits[row].float().clone()
    for code in set(history[row].tolist()):
        if 0 <= code < len(row_logits):
            old = row_logits[code]
            row_logits[code] = old / penalty[row] if old > 0 else old * penalty[row]
    if temperature[row] == 0:
        return row_logits.tolist().index(max(row_logits.tolist()))
    scaled = (row_logits / temperature[row]).tolist()
    key = [int(seeds[row]) % 2**32, (int(seeds[row]) >> 32) % 2**32]
    frame = [int(frames[row]) % 2**32, int(frames[row]) >> 32]

    def score(code: int) -> float:
        word = philox([code // 4, codebook, *frame], key)[code % 4]
        u = (word >> 9) * 2.0**-23 + 2.0**-24
        return scaled[code] - math.log(-math.log(u))

    limits = int(top_k[row]), float(top_p[row]), float(min_p[row])
    return max(sorted(kept_codes(scaled, *limits)), key=score)


def test_philox_gives_the_published_words():
    """Random123's kat_vectors for philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for words, expected in [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        tensors = [torch.tensor([word]) for word in words]
        got = specification.philox(tuple(tensors[:4]), tuple(tensors[4:]))
        assert [int(word) for word in got] == expected
        assert philox(words[:4], words[4:]) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 4096, 33, 1])
def test_equals_the_reference(target, vocab_size, dtype):
    rows = target.few(1000 if vocab_size == VOCAB_SIZE else 100)
    logits = (torch.randn(rows, vocab_size) * torch.rand(rows, 1) * 6).to(dtype)
    args = arguments(logits, **mixed_parameters(rows, vocab_size), codebook=31)
    assert torch.equal(target.run("sample_tokens", *args), reference("sample_tokens", *args))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 130])
def test_logits_of_any_spread_equal_the_reference(target, vocab_size):
    """Flat, coarse, far from zero, masked, or with one code far above the others."""
    rows = 8 * target.few(40)
    logits = torch.randn(rows, vocab_size)
    logits[0::8] *= 1e-3
    logits[1::8] = logits[1::8] * 1e-7 + 1
    logits[2::8] = logits[2::8].round()
    logits[3::8] = logits[3::8] * 20 - 300
    logits[4::8, ::2] = -1e30
    logits[5::8, 5:-9] = -INF
    logits[6::8] = -0.25
    logits[7::8, 77] = 60
    args = arguments(logits, **mixed_parameters(rows, vocab_size), codebook=3)
    assert torch.equal(target.run("sample_tokens", *args), reference("sample_tokens", *args))


def test_equals_the_rules_applied_by_hand(target):
    rows, vocab_size = 150, 37
    logits = torch.randn(rows, vocab_size) * 2
    logits[::2] = logits[::2].round()  # many ties
    parameters = mixed_parameters(rows, vocab_size)
    parameters["top_k"] = parameters["top_k"].clamp(max=5)
    args = arguments(logits, **parameters, codebook=7)
    expected = torch.tensor([by_hand(args, row) for row in range(rows)])
    assert torch.equal(target.run("sample_tokens", *args), expected)


@pytest.mark.parametrize("vocab_size", [40, VOCAB_SIZE])
def test_kept_sets_of_the_specification(vocab_size):
    rows = 12 if vocab_size == VOCAB_SIZE else 100
    logits = torch.randn(rows, vocab_size) * 3
    logits[::4] = logits[::4].round()
    logits[1] = -INF
    logits[1, 5] = 0.0
    p = mixed_parameters(rows, vocab_size)
    kept = specification.kept(logits, p["top_k"], p["top_p"], p["min_p"])
    for row in range(rows):
        limits = int(p["top_k"][row]), float(p["top_p"][row]), float(p["min_p"][row])
        assert set(kept[row].nonzero().flatten().tolist()) == kept_codes(
            logits[row].tolist(), *limits
        )


CHAINS = [
    {"temperature": 0.9, "top_k": 50},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
]


def transformers_probabilities(logits: Tensor, chain: dict) -> Tensor:
    process = pytest.importorskip("transformers.generation.logits_process")
    warpers = {
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    for name, value in chain.items():
        logits = warpers[name](value)(None, logits)
    return logits.double().softmax(-1)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_keeps_what_transformers_keeps(chain):
    logits = torch.randn(64, VOCAB_SIZE) * 3
    _, _, top_k, top_p, min_p, *_ = arguments(logits, **chain)
    kept = specification.kept(logits / chain["temperature"], top_k, top_p, min_p)
    assert torch.equal(kept, transformers_probabilities(logits, chain) > 0)


@pytest.mark.parametrize("chain", [*CHAINS, {}], ids=str)
def test_frequencies_are_the_probabilities(target, chain):
    """Pearson's chi-square over 20000 seeds, against transformers' distribution."""
    draws, vocab_size = max(target.few(20000), 5000), 24
    logits = torch.randn(1, vocab_size)
    probabilities = transformers_probabilities(logits, chain)[0]
    codes = draw(target, logits.expand(draws, -1), **chain)
    counts = codes.bincount(minlength=vocab_size)
    assert not counts[probabilities == 0].any()
    expected = draws * probabilities[probabilities > 0]
    assert expected.min() > 5
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's quantile, 4 standard deviations out.
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 4 * spread**0.5) ** 3


def test_greedy_is_the_lowest_of_the_largest(target):
    logits = torch.randn(5, 300)
    logits[:, [40, 250]] = 9.0
    assert draw(target, logits, temperature=0.0, top_k=3).tolist() == [40] * 5
    assert (
        draw(target, -logits.abs(), temperature=0.0).tolist() == (-logits.abs()).argmax(-1).tolist()
    )
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -0.0]]).repeat(2, 1)  # two zeros are equal
    assert draw(target, zeros, temperature=0.0).tolist() == [1, 1]


def test_ties_stay_and_are_drawn_evenly(target):
    """The k-th largest value occurs four times, so top-k 2 keeps five codes."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0, 2.0, 2.0]]).expand(4000, -1)
    counts = draw(target, logits, top_k=2).bincount(minlength=7)
    assert counts[[0, 4]].sum() == 0
    share = 4000 / (math.e + 4)
    assert (counts[[2, 3, 5, 6]] - share).abs().max() < 5 * share**0.5
    # 3.0 has 0.40 of the mass, so top-p 0.5 also keeps all of the tied four, and no more.
    assert set(draw(target, logits, top_p=0.5).tolist()) == {1, 2, 3, 5, 6}
    # All equal: no filter may prefer one.
    equal = torch.full((2000, 8), -3.5)
    assert set(draw(target, equal, top_k=2, top_p=0.1, min_p=1.0).tolist()) == set(range(8))


@pytest.mark.parametrize("other", [22, 6, 39])
@pytest.mark.parametrize("limits", [{}, {"min_p": 1e-20}, {"top_p": 0.9999}], ids=str)
def test_near_ties_are_settled_in_float64(target, other, limits):
    """Two codes whose scores differ by less than float32 can resolve."""
    rows, vocab_size = 2000, 40
    seeds, frames = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    luck = -(-specification.uniform(seeds, frames, 0, vocab_size).log()).log()
    logits = torch.full((rows, vocab_size), -50.0)
    logits[:, 7] = 0.0
    logits[:, other] = (luck[:, 7] - luck[:, other]).float()
    args = arguments(logits, seeds=seeds, frames=frames, **limits)
    expected = reference("sample_tokens", *args)
    assert set(expected.tolist()) == {7, other}
    assert torch.equal(target.run("sample_tokens", *args), expected)


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_tightest_limits_leave_the_most_likely(target, limits):
    logits = torch.randn(64, VOCAB_SIZE)
    assert torch.equal(draw(target, logits, **limits), logits.argmax(-1))


def test_top_k_past_the_vocabulary_keeps_all(target):
    logits = torch.randn(500, 19)
    unlimited = draw(target, logits)
    for top_k in (19, 20, 2**31 - 1):
        assert torch.equal(draw(target, logits, top_k=top_k), unlimited)


def test_minus_infinity_is_never_drawn(target):
    logits = torch.randn(2000, 16)
    logits[:, [0, 7, 15]] = -INF
    codes = draw(target, logits)
    assert set(codes.tolist()) == set(range(16)) - {0, 7, 15}
    assert torch.equal(draw(target, logits, temperature=0.0), logits.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("vocab_size", [1, 9, VOCAB_SIZE])
def test_a_row_that_is_not_finite_draws_no_code(target, dtype, temperature, vocab_size):
    """Wherever the number lies; other rows draw what they draw without it."""
    logits = torch.randn(24, vocab_size).to(dtype)
    parameters = {
        "temperature": temperature,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "history": torch.randint(0, vocab_size, (24, 7)),
    }
    expected = draw(target, logits, **parameters)
    assert expected.min() >= 0
    for value in (INF, float("nan"), -float("nan")):
        ruined = logits.clone()
        for row, code in ((0, 0), (3, vocab_size // 2), (11, vocab_size - 1), (23, 7)):
            ruined[row, code % vocab_size] = value
        ruined[5] = value
        ruined[6] = -INF
        rows = torch.tensor([0, 3, 5, 6, 11, 23])
        codes = draw(target, ruined, **parameters)
        assert torch.equal(codes, expected.index_fill(0, rows, -1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-44])
def test_temperature_near_zero_is_nearly_greedy(target, temperature):
    logits = torch.randn(32, 100)
    codes = draw(target, logits, temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    assert torch.equal(codes, logits.argmax(-1))


def test_repetition_penalty(target):
    logits = torch.tensor([[4.0, 3.0, -1.0, -1.5]]).repeat(6, 1)
    logits[3:] = torch.tensor([-1.0, -1.5, -9.0, -9.0])
    history = torch.tensor(
        [
            [-1, -1],  # empty entries: nothing is penalised
            [0, -1],  # 4 / 1.4 < 3
            [0, 0],  # 4 / 1.2 > 3, but not if it counted twice
            [0, -1],  # a negative logit is multiplied: -1.4 > -1.5
            [0, 0],  # twice would be -1.96 < -1.5
            [9, 2**40],  # outside the vocabulary
        ]
    )
    penalty = torch.tensor([1.4, 1.4, 1.2, 1.4, 1.4, 1.4])
    greedy = {"temperature": 0.0, "repetition_penalty": penalty}
    assert draw(target, logits, history=history, **greedy).tolist() == [0, 1, 0, 0, 0, 0]
    assert draw(target, logits, **greedy).tolist() == [0, 0, 0, 0, 0, 0]  # W = 0

    # The penalty precedes temperature and filters, so the penalised code is no longer the top 1.
    codes = draw(target, logits[:3], history=history[:3], top_k=1, repetition_penalty=1.4)
    assert codes.tolist() == [0, 1, 1]


def test_draws_are_independent(target):
    """A different seed, frame or codebook gives a different draw; about 1 / V of them coincide."""
    rows, vocab_size = 4000, 16
    logits = torch.zeros(rows, vocab_size)
    base = draw(target, logits, seeds=5, frames=torch.arange(rows))
    assert torch.equal(base, draw(target, logits, seeds=5, frames=torch.arange(rows)))
    for other in (
        {"seeds": 6, "frames": torch.arange(rows)},
        {"seeds": 5 + 2**32, "frames": torch.arange(rows)},
        {"seeds": -5, "frames": torch.arange(rows)},
        {"seeds": 5, "frames": torch.arange(rows) + rows},
        {"seeds": 5, "frames": torch.arange(rows) + 2**32},
        {"seeds": 5, "frames": torch.arange(rows), "codebook": 1},
    ):
        same = (draw(target, logits, **other) == base).sum().item()
        assert abs(same - rows / vocab_size) < 5 * (rows / vocab_size) ** 0.5


def test_a_row_does_not_depend_on_its_batch(target):
    rows = max(target.few(65), 9)
    logits = torch.randn(rows, 513)
    parameters = mixed_parameters(rows, 513)
    together = draw(target, logits, **parameters)
    order = torch.randperm(rows)
    shuffled = draw(target, logits[order], **{k: v[order] for k, v in parameters.items()})
    assert torch.equal(shuffled, together[order])
    alone = [
        draw(target, logits[i : i + 1], **{k: v[i : i + 1] for k, v in parameters.items()})
        for i in range(rows)
    ]
    assert torch.equal(torch.cat(alone), together)


def test_no_rows_and_strided_rows(target):
    assert draw(target, torch.zeros(0, 7)).shape == (0,)
    wide = torch.randn(9, 200)
    assert torch.equal(
        draw(target, wide[:, 30:130], top_k=9), draw(target, wide[:, 30:130].clone(), top_k=9)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": torch.zeros(2, dtype=torch.int64)}, "top_k: expected int32, got int64"),
        ({"top_p": torch.zeros(3)}, r"top_p: expected shape \[B\] = \[2\], got \[3\]"),
        ({"history": torch.zeros(3, 4, dtype=torch.int64)}, r"history: expected shape \[B, W\]"),
        ({"logits": torch.zeros(2, 4, 4)}, "logits: expected 2 dimensions"),
        ({"logits": torch.zeros(2, 4).double()}, "logits: expected float32 or bfloat16"),
        ({"logits": torch.zeros(2, 0)}, "logits: expected .* 1 <= V"),
    ],
)
def test_errors_name_the_tensor(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.sample_tokens(*arguments(**{"logits": torch.zeros(2, 4), **changes}))


def test_opcheck():
    args = arguments(torch.randn(3, 40), history=torch.full((3, 4), -1))
    opcheck("sample_tokens", *args)
