"""The public API: one function per op, whatever the backend.

An op's signature and docstring are its public API. Its body is its fake (meta) kernel: shapes
and dtypes of the result, nothing else; the decorator registers it and returns a function that
calls the backend chosen for the device (see `voxkern.backend`).

Letters: B sequences, T tokens, K codebooks, V audio vocabulary, C model width, F feed-forward
width, Hq / Hkv query and key/value heads, D head width, P pages, S page size, L layers.
Floating-point tensors are float32 or bfloat16, all of one op alike unless stated; every kernel
accumulates in float32 and rounds once, when it stores. What is said to be a *matrix* may also be
packed, whatever the others are: `voxkern.quantize.pack` of the shape that is given.
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
        residual: `[..., C]`, contiguous; updated in place. The norm is of its rounded value.
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
    """Rotate q and k, and write k and v to their slots of the paged KV cache.

    Rotary embedding in the half-split layout (Su et al. 2021, https://arxiv.org/abs/2104.09864;
    element i pairs with element i + D/2).

    Args:
        q: `[T, Hq, D]`; rotated in place. q, k and v may be views of one projection: only the
            last two dimensions must be contiguous.
        k: `[T, Hkv, D]`; left as it is.
        v: `[T, Hkv, D]`.
        rope_table: `[max_positions, D]` float32, cosines in columns `0..D/2`, sines in the rest.
        positions: `[T]` int64, the row of `rope_table` for each token.
        slots: `[T]` int64, `page * S + offset`; a token with a negative slot is not written.
        k_pages: `[P, Hkv, S, D]`; written in place.
        v_pages: `[P, Hkv, S, D]`; written in place.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also a position or a slot outside
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

    Sequence b owns the queries `cu_seqlens[b] .. cu_seqlens[b + 1]`; they are the last ones of
    its `seq_lens[b]` positions, so a prompt can continue a cached prefix. Their keys and values
    are already in the pages (`append_kv`). Online softmax (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135).

    Args:
        q: `[T, Hq, D]`; the last two dimensions contiguous. Query head h reads key/value head
            `h // (Hq / Hkv)`.
        k_pages: `[P, Hkv, S, D]`.
        v_pages: `[P, Hkv, S, D]`.
        page_table: `[B, M]` int32, the pages of each sequence in order; entries past its length
            are not read.
        cu_seqlens: `[B + 1]` int32, from 0 to T.
        seq_lens: `[B]` int32, keys of each sequence, its new ones included.
        scale: factor on `q . k`, usually `D ** -0.5`.

    Returns:
        `[T, Hq, D]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also a page or length outside its
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
        RuntimeError: a shape or dtype does not fit; on the CPU also a page or length outside its
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

    A packed weight is multiplied with x rounded to int8, in groups of 32 columns
    (`voxkern.quantize.quantize_rows`): exact integer products within a group, groups added in
    float32 in ascending order. Every instruction set gives the same bits then. A row with a value
    that is not finite gives NaN.

    Args:
        x: `[..., C]`.
        weight: matrix `[N, C]`, contiguous.

    Returns:
        `[..., N]`, contiguous; N of a packed weight is a multiple of 16.

    Raises:
        RuntimeError: a shape or dtype does not fit; the message names the tensor.
    """
    return x.new_empty((*x.shape[:-1], num_rows(weight)))


@op
def embed_frames(frames: Tensor, mask: Tensor, audio_table: Tensor, text_table: Tensor) -> Tensor:
    """Sum of the embeddings of a frame's audio codes and its text token, where the mask is set.

    Args:
        frames: `[T, K + 1]` int64, audio codes in columns `0..K-1`, a text id in column K.
        mask: `[T, K + 1]` bool; a masked entry (False) is not looked up and may hold anything.
        audio_table: `[K * V, C]`; code c of codebook k is row `k * V + c`.
        text_table: `[text vocabulary, C]`.

    Returns:
        `[T, C]`; zeros for a row without any set entry.

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

    - Repetition penalty (Keskar et al. 2019, https://arxiv.org/abs/1909.05858): each distinct
      code in `history` once, a positive logit divided by it, any other multiplied.
    - Temperature 0 is greedy: the largest penalised logit, the lowest code among equals.
    - Top-k keeps the k largest logits and those equal to the k-th. 0 keeps all.
    - Top-p (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751) keeps a code if the
      probability of all codes strictly more likely than it, after top-k, is below `top_p`; so
      ties stay, and the most likely always does. 1 keeps all.
    - Min-p keeps a code at least `min_p` times as likely as the most likely. 0 keeps all.
    - The draw is an exponential race: `argmax(logit / temperature - log(-log(u)))` over the kept
      codes, the lowest code among equals. For code i, `u = (x >> 9) * 2**-23 + 2**-24`, x being
      word `i % 4` of Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405)
      with key `(seed low, seed high)` and counter `(i // 4, codebook, frame low, frame high)`.

    A NaN logit is treated as minus infinity. A row whose largest scaled logit is infinite (a
    temperature near 0, or no finite logit) is greedy.

    Args:
        logits: `[B, V]`.
        temperature: `[B]` float32.
        top_k: `[B]` int32.
        top_p: `[B]` float32.
        min_p: `[B]` float32.
        repetition_penalty: `[B]` float32; 1 is none.
        history: `[B, W]` int64, the codes that the penalty applies to; -1 (or any code outside
            `0..V-1`) is an empty place. W may be 0.
        seeds: `[B]` int64, one per request.
        frames: `[B]` int64, index of the frame within its request.
        codebook: which codebook is drawn.

    Returns:
        `[B]` int64.
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
    rotary grouped-query attention over paged keys and values, SwiGLU; a norm behind the last.
    In float32 the result is, bit for bit, that of `rms_norm`, then for each layer `linear`,
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
        num_heads, num_kv_heads: query and key/value heads.
        eps: of every norm.
        positions: `[B]` int64, the row of `rope_table` for each token.
        slots: `[B]` int64, `page * S + offset` of each token; nothing is written for a negative
            one. No row may attend to a slot that is written for another in the same call.
        k_pages, v_pages: `[L, P, num_kv_heads, S, D]`; written in place.
        page_table: `[B, M]` int32, as in `prefill_attention`, the same for all layers.
        seq_lens: `[B]` int32, keys of each sequence, its new one included.

    Returns:
        `[B, C]`, contiguous: the hidden states after the last norm.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also a position, slot, page or
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
    persistent: bool = False,
) -> Tensor:
    """The depth decoder: from codebook 0 to a whole frame, in one call.

    Position 0 takes `projection(hidden)`; position p takes the audio row of codebook p - 1, and
    its output through `heads[p - 1]` gives codebook p, drawn as in `sample_tokens` without a
    repetition penalty. The layers are Llama's (pre-norm, rotary GQA,
    SwiGLU); their KV cache lives for this call only.

    Args:
        hidden: `[B, Cb]`, the backbone's hidden states after its last norm.
        code0: `[B]` int64, codebook 0.
        audio_rows: `[K * V, C]`, the depth decoder's embeddings of codes, already through the
            projection; code c of codebook k is row `k * V + c`.
        projection: matrix `[C, Cb]`.
        attn_norm, mlp_norm: `[L, C]`.
        qkv: matrices `[L, (num_heads + 2 * num_kv_heads) * D, C]`, q rows first, then k, then v.
        o: matrices `[L, C, num_heads * D]`.
        gate_up: matrices `[L, 2F, C]`, gate rows first.
        down: matrices `[L, C, F]`.
        norm: `[C]`.
        heads: matrices `[K - 1, V, C]`.
        rope_table: `[at least K, D]` float32, as in `append_kv`.
        num_heads, num_kv_heads: query and key/value heads.
        eps: of every norm.
        temperature, top_k, top_p, min_p, seeds, frames: `[B]`, as in `sample_tokens`.
        persistent: as one kernel for the whole frame, where the backend has one that takes these
            sizes and rows. The codes are the same.

    Returns:
        `[B, K]` int64, `code0` in column 0. A persistent kernel whose blocks wait for each other
        in vain gives up: what it has not drawn is then -1.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also a code outside `0..V-1`.
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

    Output t is the product of the weight with blocks `t - (J - 1) dilation, .., t - dilation, t`,
    side by side; blocks before x are the past. A strided convolution has several samples in a
    block of x, a transposed one in a row of the output.

    All is float32, but the weight may be bfloat16; then the blocks are rounded to bfloat16 too,
    after the ELU. No output depends on T, on other outputs or on other streams.

    Args:
        x: `[B, T, C]`, C the width of a block.
        past: `[B, (J - 1) * dilation, C]`, the blocks before x; in place, it becomes what comes
            before the next x.
        weight: `voxkern.quantize.block_rows` of `[N, J * C]`, the oldest block first.
        bias: `[N]`, contiguous.
        add: `[B, T, N]`, summed to the output, or None.
        dilation: blocks from tap to tap.
        elu: whether x and the past pass through an ELU (Clevert et al. 2015,
            https://arxiv.org/abs/1511.07289) first.

    Returns:
        `[B, T, N]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype does not fit; the message names the tensor.
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
    """Convolutions of streams one after another, each as `mimi_conv`: Mimi's SEANet in one call.

    Args:
        x: `[B, T, C]` samples, value 0. The output of convolution i is value i + 1.
        fresh: `[B]` bool, the streams that begin.
        past: for each convolution, as `mimi_conv` takes and leaves it.
        weights, biases: likewise.
        plan: seven integers for each convolution: the value that it takes; the one added to its
            output, or -1; dilation; whether there is an ELU; samples in a block of its input (a
            stride) and of its output (a transposed convolution's stride); whether a stream that
            begins has the first sample for a past, over and over.

    Returns:
        The last convolution's output, as samples.

    Raises:
        RuntimeError: a shape, dtype or number does not fit; the message names the argument.
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
    LayerNorms and rotary embedding in the half-split layout; there is no norm behind the last. A
    query sees its own key and the `window - 1` before it. Keys and values lie in a ring, that of a
    stream's step at position p in slot `p % capacity`; so what is where depends on positions alone,
    and a stream that begins needs nothing cleared.

    All is float32, but matrices may be bfloat16, or packed; then what they are multiplied with is
    rounded to bfloat16, or to int8 as in `linear`. No result depends on T or on other streams.

    Args:
        x: `[B, T, C]`.
        positions: `[B]` int64, of each stream's first step, 0 or more.
        frequencies: `[D / 2]`, the angles of rotation per step.
        norms: `[L, 4, C]`: scale and bias of the norm before attention, of the norm after it.
        qkv: matrices `[L, (Hq + 2 Hkv) D, C]`, q rows first, then k, then v.
        qkv_bias: `[L, (Hq + 2 Hkv) D]`.
        o: matrices `[L, C, Hq D]`.
        o_bias: `[L, C]`.
        up: matrices `[L, F, C]`.
        down: matrices `[L, C, F]`.
        eps: of the norms.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        keys: `[B, L, Hkv, capacity, D]`, capacity at least `window - 1 + T`; the new ones are
            written in place.
        values: like keys.
        window: keys that a query sees, itself included.

    Returns:
        `[B, T, C]`, contiguous.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also a position below 0.
    """
    return x.new_empty(x.shape)
