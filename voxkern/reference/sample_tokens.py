import torch
from torch import Tensor

# Philox 4x32-10's multipliers and Weyl constants (Salmon et al. 2011, table 2 and section 4).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    history: Tensor,
    seeds: Tensor,
    frames: Tensor,
    codebook: int,
) -> Tensor:
    """Each filter is a threshold on the logits; a code must pass the largest of them.

    Sums of probabilities and the draw's scores are float64, so that backends that sum in another
    order draw the same codes.
    """
    logits = penalise(
        logits.float().nan_to_num(float("inf"), float("inf"), float("-inf")),
        repetition_penalty,
        history,
    )
    broken = logits.amax(-1).isinf()
    greedy = ~(temperature > 0)
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    # Infinite scores cannot be ranked: the temperature is near 0, or the row is broken.
    greedy |= scaled.amax(-1).isinf()
    keep = kept(scaled, top_k, top_p, min_p)
    scores = relative(scaled) - (-uniform(seeds, frames, codebook, logits.shape[1]).log()).log()
    scores.masked_fill_(~keep, float("-inf"))
    codes = first_largest(torch.where(greedy[:, None], logits.double(), scores))
    return codes.masked_fill(broken, -1)


def penalise(logits: Tensor, penalty: Tensor, history: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    inside = (history >= 0) & (history < vocab_size)
    # Empty entries go to an extra column, which is dropped afterwards.
    seen = logits.new_zeros(logits.shape[0], vocab_size + 1, dtype=torch.bool)
    seen.scatter_(1, torch.where(inside, history, vocab_size), True)
    penalty = penalty[:, None]
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, :vocab_size], penalised, logits)


def relative(scaled: Tensor) -> Tensor:
    """Logits minus the row's largest, float64; 0 at the largest even if it is infinite."""
    scaled = scaled.double()
    largest = scaled.amax(-1, keepdim=True)
    return torch.where(scaled == largest, 0.0, scaled - largest)


def kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`[B, V]` bool: the codes that pass top-k, top-p and min-p."""
    vocab_size = scaled.shape[1]
    ordered = relative(scaled).sort(-1, descending=True).values
    k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k).long()
    lowest = ordered.gather(1, k[:, None] - 1)

    odds = ordered.exp().masked_fill(ordered < lowest, 0.0)
    sums = odds.cumsum(-1)
    more_likely = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), -1)
    # For equal values the first one's sum decides for all of them.
    nucleus = more_likely < top_p.double()[:, None] * sums[:, -1:]
    nucleus |= (top_p >= 1)[:, None]
    nucleus[:, 0] = True
    lowest = lowest.maximum(ordered.where(nucleus, float("inf")).amin(-1, keepdim=True))
    lowest = lowest.maximum(min_p.double().log()[:, None].clamp(max=0.0))
    return relative(scaled) >= lowest


def uniform(seeds: Tensor, frames: Tensor, codebook: int, vocab_size: int) -> Tensor:
    """Random numbers of the draw: `[B, V]` float64 in (0, 1)."""
    blocks = torch.arange(-(-vocab_size // 4), device=seeds.device)
    counter = torch.broadcast_tensors(
        blocks,
        torch.full_like(blocks, codebook),
        (frames & _LOW)[:, None],
        (frames >> 32 & _LOW)[:, None],
    )
    key = (seeds & _LOW)[:, None], (seeds >> 32 & _LOW)[:, None]
    words = torch.stack(philox(counter, key), -1).flatten(1)[:, :vocab_size]
    return (words >> 9).double() * 2.0**-23 + 2.0**-24


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four random words from four counter and two key words.

    Words are int64 tensors in 0..2^32-1; int64 products wrap, so all their 64 bits are right.
    """
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(10):
        product0 = a * _MULTIPLIERS[0]
        product1 = c * _MULTIPLIERS[1]
        a = (product1 >> 32 & _LOW) ^ b ^ key0
        c = (product0 >> 32 & _LOW) ^ d ^ key1
        b = product1 & _LOW
        d = product0 & _LOW
        key0 = key0 + _WEYL[0] & _LOW
        key1 = key1 + _WEYL[1] & _LOW
    return a, b, c, d


def first_largest(scores: Tensor) -> Tensor:
    """Index of each row's largest score, the lowest among equals; `argmax` does not guarantee
    that."""
    index = torch.arange(scores.shape[1], device=scores.device)
    is_largest = scores == scores.amax(-1, keepdim=True)
    return index.where(is_largest, scores.shape[1]).amin(-1)
