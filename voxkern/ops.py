"""The public API: one function per op, for all backends.

An op's signature and docstring are its public API. Its body is its fake (meta) kernel: it computes
only the shape and dtype of the result. The decorator registers it and returns a function that calls
the backend chosen for the device (see `voxkern.backend`).

Letters: B sequences, T tokens, K codebooks, V audio vocabulary, C model width, F feed-forward
width, Hq / Hkv query and key/value heads, D head width, P pages, S page size, L layers.
Floating-point tensors are float32 or bfloat16, the same for all tensors of a call unless stated;
every kernel accumulates in float32 and rounds once, when it stores. A weight called a *matrix* may
also be packed, whatever the other dtypes are: the result of `voxkern.quantize.pack` on a weight of
the given shape.
"""

import torch
from torch import Tensor

from voxkern.backend import op
from voxkern.quantize import num_rows


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation, `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: `[..., C]`.
        weight: `[C]`.
        eps: added to the mean square.

    Returns:
        `[..., C]`, contiguous.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467
    """
    return x.new_empty(x.shape)


@op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x`, then `rms_norm(residual, weight, eps)`, in one pass.

    Args:
        x: `[..., C]`, the output of a transformer branch.
        residual: `[..., C]`, contiguous; updated in place, rounded, then normalised.
        weight: `[C]`.
        eps: added to the mean square.

    Returns:
        `[..., C]`, contiguous.
    """
    return x.new_empty(x.shape)


@op
def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    """Rotate q and k, and write k and v to their slots in the paged KV cache.

    Rotary embedding in the half-split layout (Su et al. 2021, https://arxiv.org/abs/2104.09864;
    element i pairs with element i + D/2).

    Args:
        q: `[T, Hq, D]`; rotated in place. q, k and v may be views of one projection: only their
            last two dimensions must be contiguous.
        k: `[T, Hkv, D]`; unchanged.
        v: `[T, Hkv, D]`.
        rope_table: `[max_positions, D]` float32, cosines in columns `0..D/2`, sines in the rest.
        positions: `[T]` int64, the row of `rope_table` for each token.
        slots: `[T]` int64, `page * S + offset`; a token with a negative slot is not written.
        k_pages: `[P, Hkv, S, D]`; written in place.
        v_pages: `[P, Hkv, S, D]`; written in place.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a position or a slot outside
            its table.
    """


@op
def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal grouped-query attention of ragged prompts over paged keys and values.

    Sequence b owns the queries `cu_seqlens[b] .. cu_seqlens[b + 1]`. They are the last of its
    `seq_lens[b]` positions, so a prompt can continue a cached prefix. Their keys and values must
    already be in the pages (`append_kv`). Online softmax (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135). On the CPU and in Triton, and on CUDA in
    float32, a query's result has the bits that `decode_attention` gives at its position
    (docs/kernels.md, "One position, one result").

    Args:
        q: `[T, Hq, D]`; the last two dimensions contiguous. Query head h reads key/value head
            `h // (Hq / Hkv)`.
        k_pages: `[P, Hkv, S, D]`.
        v_pages: `[P, Hkv, S, D]`.
        page_table: `[B, M]` int32, the pages of each sequence in order; entries past its length
            are not read.
        cu_seqlens: `[B + 1]` int32, from 0 to T.
        seq_lens: `[B]` int32, keys of each sequence, including the new ones.
        scale: factor on `q . k`, usually `D ** -0.5`.

    Returns:
        `[T, Hq, D]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a page or length outside its
            table.
    """
    return q.new_empty(q.shape)


@op
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Grouped-query attention of one query per sequence over its paged keys and values.

    Args:
        q: `[B, Hq, D]`; the last two dimensions contiguous.
        k_pages: `[P, Hkv, S, D]`.
        v_pages: `[P, Hkv, S, D]`.
        page_table: `[B, M]` int32, as in `prefill_attention`.
        seq_lens: `[B]` int32, keys of each sequence. A row of length 0 gives zeros.
        scale: factor on `q . k`.

    Returns:
        `[B, Hq, D]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a page or length outside its
            table.
    """
    return q.new_empty(q.shape)


@op
def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's product, `silu(gate) * up` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        gate_up: `[..., 2F]`, the gate in the first half of each row.

    Returns:
        `[..., F]`, contiguous.
    """
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@op
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`.

    Each output element is summed in an order that depends on C alone, so a row's result does not
    depend on the other rows: a request gets the same codes alone and in a batch.

    With a packed weight, x is rounded to int8 in groups of 32 columns
    (`voxkern.quantize.quantize_rows`): integer products within a group are exact, and groups are
    added in float32 in ascending order, so every instruction set gives the same bits. A row with a
    value that is not finite gives NaN.

    Args:
        x: `[..., C]`.
        weight: matrix `[N, C]`, contiguous.

    Returns:
        `[..., N]`, contiguous; for a packed weight, N is a multiple of 16.

    Raises:
        RuntimeError: a shape or dtype is wrong; the message names the tensor.
    """
    return x.new_empty((*x.shape[:-1], num_rows(weight)))


@op
def embed_frames(frames: Tensor, mask: Tensor, audio_table: Tensor, text_table: Tensor) -> Tensor:
    """Sum of the embeddings of a frame's audio codes and text token, where the mask is set.

    Args:
        frames: `[T, K + 1]` int64, audio codes in columns `0..K-1`, a text id in column K.
        mask: `[T, K + 1]` bool; a masked entry (False) is not looked up and may hold anything.
        audio_table: `[K * V, C]`; code c of codebook k is row `k * V + c`.
        text_table: `[text vocabulary, C]`.

    Returns:
        `[T, C]`; zeros for a row with no set entry.

    Raises:
        RuntimeError: on the CPU, a set entry outside its table.
    """
    return audio_table.new_empty((frames.shape[0], audio_table.shape[1]))


@op
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
    """Draw one code per row, in one pass over its logits.

    Order: logits to float32, repetition penalty, temperature, top-k, top-p, min-p, draw.

    - Repetition penalty (Keskar et al. 2019, https://arxiv.org/abs/1909.05858): applied once to
      each distinct code in `history`; a positive logit is divided by it, any other multiplied.
    - Temperature 0 is greedy: the largest penalised logit, the lowest code among equals.
    - Top-k keeps the k largest logits and all that equal the k-th. 0 keeps all.
    - Top-p (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751) keeps a code if the total
      probability, after top-k, of the codes strictly more likely than it is below `top_p`. So ties
      are kept together, and the most likely code is always kept. 1 keeps all.
    - Min-p keeps a code at least `min_p` times as likely as the most likely. 0 keeps all.
    - The draw is the Gumbel-max trick: `argmax(logit / temperature - log(-log(u)))` over the kept
      codes, the lowest code among equals. For code i, `u = (x >> 9) * 2**-23 + 2**-24`, where x is
      word `i % 4` of Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405)
      with key `(seed low, seed high)` and counter `(i // 4, codebook, frame low, frame high)`.

    A row whose largest penalised logit is not finite draws no code: it holds NaN or plus infinity,
    or nothing but minus infinity. A row whose largest scaled logit is infinite (a temperature near
    0) is greedy.

    Args:
        logits: `[B, V]`.
        temperature: `[B]` float32.
        top_k: `[B]` int32.
        top_p: `[B]` float32.
        min_p: `[B]` float32.
        repetition_penalty: `[B]` float32; 1 has no effect.
        history: `[B, W]` int64, the codes that the penalty applies to; -1 (or any code outside
            `0..V-1`) is an empty entry. W may be 0.
        seeds: `[B]` int64, one per request.
        frames: `[B]` int64, index of the frame within its request.
        codebook: index of the codebook that is drawn.

    Returns:
        `[B]` int64; -1 in rows that draw no code.
    """
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


@op
def decode_backbone(
    x: Tensor,
    attn_norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    norm: Tensor,
    rope_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """All layers of a transformer for one new token of each sequence, in one call.

    The layers are Llama's (Touvron et al. 2023, https://arxiv.org/abs/2302.13971): pre-norm,
    rotary grouped-query attention over paged keys and values, SwiGLU; a norm follows the last.
    In float32 the result equals, bit for bit, that of `rms_norm`, then for each layer `linear`,
    `append_kv`, `decode_attention` with a scale of `D ** -0.5`, `linear`, `add_rms_norm`,
    `linear`, `silu_mul`, `linear` and `add_rms_norm`; in bfloat16 it is rounded where they store.

    Args:
        x: `[B, C]`, the embedded tokens.
        attn_norm, mlp_norm: `[L, C]`.
        qkv: matrices `[L, (num_heads + 2 * num_kv_heads) * D, C]`, q rows first, then k, then v.
        o: matrices `[L, C, num_heads * D]`.
        gate_up: matrices `[L, 2F, C]`, gate rows first.
        down: matrices `[L, C, F]`.
        norm: `[C]`.
        rope_table: `[max_positions, D]` float32, as in `append_kv`.
        num_heads, num_kv_heads: numbers of query and key/value heads.
        eps: added to the mean square in every norm.
        positions: `[B]` int64, the row of `rope_table` for each token.
        slots: `[B]` int64, `page * S + offset` of each token; a negative slot is not written. No
            row may attend to a slot that the same call writes for another row.
        k_pages, v_pages: `[L, P, num_kv_heads, S, D]`; written in place.
        page_table: `[B, M]` int32, as in `prefill_attention`, the same for all layers.
        seq_lens: `[B]` int32, keys of each sequence, including the new one.

    Returns:
        `[B, C]`, contiguous: the hidden states after the last norm.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a position, slot, page or
            length outside its table.
    """
    return x.new_empty(x.shape)


@op
def decode_depth(
    hidden: Tensor,
    code0: Tensor,
    audio_rows: Tensor,
    projection: Tensor,
    attn_norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    norm: Tensor,
    heads: Tensor,
    rope_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    frames: Tensor,
) -> Tensor:
    """The depth decoder: from codebook 0 to a whole frame, in one call.

    Position 0 takes `projection(hidden)`. Position p takes the audio row of the code of codebook
    p - 1; `heads[p - 1]` turns its output into logits, from which codebook p is drawn as in
    `sample_tokens`, without a repetition penalty. The layers are Llama's (pre-norm, rotary GQA,
    SwiGLU); their KV cache lives for this call only.

    Args:
        hidden: `[B, Cb]`, the backbone's hidden states after its last norm.
        code0: `[B]` int64, codebook 0; -1 in rows that drew none.
        audio_rows: `[K * V, C]`, the depth decoder's embeddings of codes, with the projection
            already applied; code c of codebook k is row `k * V + c`.
        projection: matrix `[C, Cb]`.
        attn_norm, mlp_norm: `[L, C]`.
        qkv: matrices `[L, (num_heads + 2 * num_kv_heads) * D, C]`, q rows first, then k, then v.
        o: matrices `[L, C, num_heads * D]`.
        gate_up: matrices `[L, 2F, C]`, gate rows first.
        down: matrices `[L, C, F]`.
        norm: `[C]`.
        heads: matrices `[K - 1, V, C]`.
        rope_table: `[at least K, D]` float32, as in `append_kv`.
        num_heads, num_kv_heads: numbers of query and key/value heads.
        eps: added to the mean square in every norm.
        temperature, top_k, top_p, min_p, seeds, frames: `[B]`, as in `sample_tokens`.

    Returns:
        `[B, K]` int64, `code0` in column 0; -1 for a code that `sample_tokens` does not draw. A row
        with a -1 is not a frame: its other codes mean nothing.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a code outside `-1..V-1`.
    """
    return code0.new_empty((code0.shape[0], heads.shape[0] + 1))


@op
def mimi_conv(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    dilation: int,
    elu: bool,
) -> Tensor:
    """A causal convolution of streams, block by block: Mimi's building block.

    Output t is the product of the weight with the concatenated blocks
    `t - (J - 1) dilation, .., t - dilation, t`; blocks before x come from the past. For a strided
    convolution, a block of x holds several samples; for a transposed one, a row of the output does.

    All tensors are float32, except that the weight may be bfloat16; then the blocks are rounded to
    bfloat16 too, after the ELU. No output depends on T, on other outputs or on other streams.

    Args:
        x: `[B, T, C]`, where C is the width of a block.
        past: `[B, (J - 1) * dilation, C]`, the blocks before x; updated in place to the blocks
            before the next x.
        weight: `voxkern.quantize.block_rows` of `[N, J * C]`, the oldest block first.
        bias: `[N]`, contiguous.
        add: `[B, T, N]`, added to the output, or None.
        dilation: distance between taps, in blocks.
        elu: apply an ELU (Clevert et al. 2015, https://arxiv.org/abs/1511.07289) to x and the past
            first.

    Returns:
        `[B, T, N]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype is wrong; the message names the tensor.
    """
    return x.new_empty((*x.shape[:2], bias.shape[0]))


@op
def mimi_convs(
    x: Tensor,
    fresh: Tensor,
    past: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> Tensor:
    """A graph of convolutions of streams, each as `mimi_conv`: Mimi's SEANet in one call.

    Args:
        x: `[B, T, C]` samples, value 0. The output of convolution i is value i + 1.
        fresh: `[B]` bool, True for streams that begin with this call.
        past: one past per convolution, read and updated as in `mimi_conv`.
        weights, biases: one per convolution, as in `mimi_conv`.
        plan: seven integers per convolution: index of its input value; index of the value added to
            its output, or -1; dilation; 1 for an ELU; samples per block of its input (a stride);
            samples per block of its output (a transposed convolution's stride); 1 if the past of a
            stream that begins is its first sample, repeated.

    Returns:
        The last convolution's output, as samples.

    Raises:
        RuntimeError: a shape, dtype or number is wrong; the message names the argument.
    """
    values = [x]
    for i in range(len(weights)):
        source, _, _, _, block_in, block_out, _ = plan[7 * i : 7 * i + 7]
        batch, samples, _ = values[source].shape
        shape = batch, samples // block_in * block_out, biases[i].shape[0] // block_out
        values.append(x.new_empty(shape))
    return values[-1]


@op
def mimi_transformer(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    norms: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    o: Tensor,
    o_bias: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    activation: str,
    keys: Tensor,
    values: Tensor,
    window: int,
) -> Tensor:
    """Mimi's transformer for the next T steps of streams: pre-norm, with a sliding window.

    A layer is `x += o(attention(qkv(norm(x))))`, `x += down(activation(up(norm(x))))` with
    LayerNorms and rotary embedding in the half-split layout; no norm follows the last layer. A
    query sees its own key and the `window - 1` before it. Keys and values are kept in a ring: the
    step at position p is in slot `p % capacity`. So a slot depends on the position alone, and a
    stream that begins needs nothing cleared.

    All tensors are float32, except that matrices may be bfloat16 or packed; then the activations
    they multiply are rounded to bfloat16, or to int8 as in `linear`. No result depends on T or on
    other streams.

    Args:
        x: `[B, T, C]`.
        positions: `[B]` int64, position of each stream's first step, 0 or more.
        frequencies: `[D / 2]`, angles of rotation per step.
        norms: `[L, 4, C]`: scale and bias of the norm before attention, then of the norm after it.
        qkv: matrices `[L, (Hq + 2 Hkv) D, C]`, q rows first, then k, then v.
        qkv_bias: `[L, (Hq + 2 Hkv) D]`.
        o: matrices `[L, C, Hq D]`.
        o_bias: `[L, C]`.
        up: matrices `[L, F, C]`.
        down: matrices `[L, C, F]`.
        eps: added to the variance in every norm.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        keys: `[B, L, Hkv, capacity, D]`, capacity at least `window - 1 + T`; new keys are written
            in place.
        values: like keys.
        window: number of keys that a query sees, including its own.

    Returns:
        `[B, T, C]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype is wrong; on the CPU also a position below 0.
    """
    return x.new_empty(x.shape)
