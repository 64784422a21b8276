"""Fits all codebooks to an encoder that no longer changes.

While the encoder trains, the codebooks lag behind it: their moving averages are of earlier latents.
So the last part of train_codes.py holds the encoder fixed, and starts with this. Codebook 0 is
fitted to the phones alone, by the expected loss of a soft choice of codes that hardens; the others
by k-means.
"""

import torch
import torch.nn.functional as F
from torch import nn

from codec import CONTENT_DIM, codebook_vectors, content, has_pulses, lloyd, nearest, rvqs

STEPS = 1500
BATCH = 1024
SOFTNESS = 3.0, 0.3  # first and last temperature, relative to the gap between the two nearest codes
SMOOTHING = 0.02  # added to the counts of each sound
LLOYD_STEPS = 10


def sound_logits(indices, labels, size: int, num_sounds: int):
    """Log shares of the sounds in the frames of each code, [size, 4 * num_sounds]."""
    counts = torch.full((size, labels.shape[1], num_sounds), SMOOTHING)
    for step in range(labels.shape[1]):
        known = labels[:, step] >= 0
        pair = indices[known], labels[known, step]
        counts[:, step].index_put_(pair, torch.ones(len(pair[0])), accumulate=True)
    return (counts / counts.sum(-1, keepdim=True)).log().flatten(1)


def fit_sounds(latents, labels, projection, vectors, num_sounds: int):
    """Fits codes to the sounds of their frames.

    latents [N, C], labels [N, 4], projection [D, C], vectors [size, D]
    -> (projection, vectors, logits [size, 4 * num_sounds])
    """
    size = len(vectors)
    with torch.no_grad():
        unit = (latents @ projection.T).std()
        latents, vectors = latents / unit, vectors / unit
        projected = latents @ projection.T
        logits = sound_logits(nearest(projected, vectors), labels, size, num_sounds)
        some = projected[:1000]
        squares = (vectors * vectors).sum(1) - 2 * some @ vectors.T
        two = squares.topk(2, largest=False).values
        gap = (two[:, 1] - two[:, 0]).mean()
    projection, vectors, logits = (nn.Parameter(x.clone()) for x in (projection, vectors, logits))
    rates = 3e-4, 2e-2, 5e-2
    groups = [
        dict(params=[p], lr=lr, peak=lr)
        for p, lr in zip((projection, vectors, logits), rates, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    for step in range(STEPS):
        share = step / STEPS
        for group in groups:
            group["lr"] = group["peak"] * min(1.0, 2 * (1 - share))
        softness = gap * SOFTNESS[0] * (SOFTNESS[1] / SOFTNESS[0]) ** share
        rows = torch.randint(len(latents), (BATCH,))
        projected = latents[rows] @ projection.T
        closeness = 2 * projected @ vectors.T - (vectors * vectors).sum(1)
        choice = (closeness / softness).softmax(1)
        logs = logits.view(size, -1, num_sounds).log_softmax(-1)
        wanted = labels[rows]
        cost = 0.0
        for part in range(wanted.shape[1]):
            known = (wanted[:, part] >= 0).float()[:, None]
            cost = cost - known * logs[:, part].T[wanted[:, part].clamp(min=0)]
        loss = (choice * cost).sum(1).mean() / wanted.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"codes fitted to sounds: expected loss {loss:.3f}", flush=True)
    return projection.detach(), vectors.detach() * unit, logits.detach()


def set_vectors(book, vectors):
    book.embed_sum.copy_(vectors)
    book.cluster_usage.fill_(1.0)
    book._embed = None


@torch.no_grad()
def refit(model, latents, labels):
    """Refits the codebooks of a Stage1 to latents [N, C] and labels [N, 4] of many frames."""
    semantic, acoustic = rvqs(model.codec)
    num_sounds = model.phones.out_features // labels.shape[1]
    book = semantic.layers[0].codebook
    known = codebook_vectors(book)[:, :CONTENT_DIM]
    before = semantic.output_proj(codebook_vectors(book).T[None])[0].T  # [size, C]
    weight = semantic.input_proj.weight[:CONTENT_DIM, :, 0]
    spoken = before[nearest(latents @ weight.T, known)]
    with torch.enable_grad():
        weight, vectors, logits = fit_sounds(latents, labels, weight, known, num_sounds)
    semantic.input_proj.weight[:CONTENT_DIM, :, 0] = weight
    set_vectors(book, F.pad(vectors, (0, book.embed_sum.shape[1] - CONTENT_DIM)))
    # Least squares: each code's output is the mean of what its frames had before, and the
    # classifier starts from the sounds of the code's frames.
    indices = nearest(latents @ weight.T, vectors)
    counts = torch.bincount(indices, minlength=len(vectors)).float()
    heard = torch.zeros_like(before).index_add_(0, indices, spoken) / counts.clamp(min=1)[:, None]
    root = counts.sqrt()[:, None]
    output = torch.linalg.lstsq(root * vectors, root * heard).solution.T
    semantic.output_proj.weight[:, :CONTENT_DIM, 0] = output
    states = F.pad(vectors @ output.T, (0, 1), value=1.0)
    fit = torch.linalg.lstsq(root * states, root * logits).solution.T
    model.phones.weight.copy_(fit[:, :-1])
    model.phones.bias.copy_(fit[:, -1])

    residual = content(acoustic.input_proj(latents.T[None]))[0].T
    for layer in acoustic.layers:
        book = layer.codebook
        if has_pulses(book):
            continue
        vectors = lloyd(residual, codebook_vectors(book), LLOYD_STEPS)
        set_vectors(book, vectors)
        left = residual - vectors[nearest(residual, vectors)]
        print(f"residual {left.square().mean() / residual.square().mean():.3f} of what it was")
        residual = left
