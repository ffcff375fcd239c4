"""
The Triton kernels of one decoding step: each of B texts reads one token. `decoding.py` launches them.

With so few texts a product is a matrix times a vector, limited by the speed at which weights are read. A
program takes ROWS rows of a weight, asks for all of them at once, and computes the vector while they come.
Each program computes the vector's norm again: that costs less than one more launch. Sums are in float32.

Shapes: B texts, K channels in, N channels out, nh heads of queries, nkv heads of keys and values, hs head
size, P splits of the slots. A size that ends in _P is rounded up to a power of two, as Triton wants it.
"""

import triton
import triton.language as tl


@triton.jit
def normalise(v, at, inside, weight, bias, SIZE: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """
    v (SIZE_P,), zero but for its first SIZE numbers -> LayerNorm (v - mean) / sqrt(variance + EPS) * weight
    + bias, or RMSNorm, without mean and bias. The norm's number for v[i] is at `at[i]`; bias None: zero.
    """
    if not RMS:
        v = tl.where(inside, v - tl.sum(v, axis=0) / SIZE, 0.0)
    v = v / tl.sqrt(tl.sum(v * v, axis=0) / SIZE + EPS)
    v = v * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def read_rows(weight, rows, at, inside, N: tl.constexpr, K: tl.constexpr):
    """
    weight (N, K) -> of its `rows` the numbers `at` (K_P,) that are `inside`, else zero (ROWS, K_P). They stay
    in their own dtype, to need few registers.
    """
    where = rows.to(tl.int64)[:, None] * K + at[None, :]
    return tl.load(weight + where, mask=(rows < N)[:, None] & inside[None, :], other=0.0)


@triton.jit
def times(w, v, bias, rows, N: tl.constexpr):
    """w (ROWS, K_P), v (K_P,) -> w v + bias (ROWS,)"""
    y = tl.sum(w.to(tl.float32) * v[None, :], axis=1)
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def add(x, y, rows, N: tl.constexpr):
    """x (N,) += y (ROWS,) at `rows`"""
    tl.store(x + rows, tl.load(x + rows, mask=rows < N, other=0.0) + y, mask=rows < N)


@triton.jit
def embed_kernel(tokens, length, wte, places, x, SCALE: tl.constexpr, C: tl.constexpr, C_P: tl.constexpr):
    """
    x (B, C) = wte (V, C)[token] * SCALE + places (block_size, C)[position], places None: no vector of the
    place. The position is the text's `length` (B,), which grows by one here. A program is one text.
    """
    text = tl.program_id(0)
    at = tl.arange(0, C_P)
    token = tl.load(tokens + text)
    position = tl.atomic_add(length + text, 1)  # gives all threads what was there before
    v = tl.load(wte + token * C + at, mask=at < C, other=0.0).to(tl.float32) * SCALE
    if places is not None:
        v += tl.load(places + position * C + at, mask=at < C, other=0.0).to(tl.float32)
    tl.store(x + text * C + at, v, mask=at < C)


@triton.jit
def norm_linear_kernel(
    x,
    norm_weight,
    norm_bias,
    weight,
    bias,
    gate,
    gate_bias,
    y,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    K_P: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """
    y (B, N) = activation(norm(x) weight^T + bias), x (B, K), weight (N, K); for "swiglu" times silu(norm(x)
    gate^T + gate_bias) instead. ACTIVATION "none" gives queries, keys and values, and logits.
    """
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K_P)
    w = read_rows(weight, rows, at, at < K, N, K)
    if ACTIVATION == "swiglu":
        g = read_rows(gate, rows, at, at < K, N, K)
    for text in range(B):
        v = tl.load(x + text * K + at, mask=at < K, other=0.0)
        v = normalise(v, at, at < K, norm_weight, norm_bias, K, EPS, RMS)
        h = times(w, v, bias, rows, N)
        if ACTIVATION == "gelu":  # h (1 + tanh(u)) / 2 is h sigmoid(2 u)
            h *= tl.sigmoid(2 * 0.7978845608028654 * (h + 0.044715 * h * h * h))  # sqrt(2 / pi)
        elif ACTIVATION == "relu2":
            h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            h *= h
        elif ACTIVATION == "swiglu":
            s = times(g, v, gate_bias, rows, N)
            h *= s * tl.sigmoid(s)
        tl.store(y + text * N + rows, h, mask=rows < N)


@triton.jit
def head_of(qkv, head, at, inside, weight, bias, EPS: tl.constexpr, RMS: tl.constexpr, HS: tl.constexpr):
    """One head's vector (HS_P,) of a text's queries, keys and values qkv (nh + 2 nkv, hs), with its norm."""
    v = tl.load(qkv + head * HS + at, mask=inside, other=0.0)
    if weight is not None:
        v = normalise(v, at, inside, weight, bias, HS, EPS, RMS)
    return v


@triton.jit
def rotated(
    qkv,
    head,
    position,
    weight,
    bias,
    cos,
    sin,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    HS: tl.constexpr,
    HS_P: tl.constexpr,
):
    """
    One head's query or key (HS_P,), with its norm, and rotated where there are cos and sin (block_size,
    hs / 2): channels i and i + hs / 2 are a point that turns by the angle of its position.
    """
    at = tl.arange(0, HS_P)
    inside = at < HS
    v = head_of(qkv, head, at, inside, weight, bias, EPS, RMS, HS)
    if cos is not None:
        angle = position * (HS // 2) + at % (HS // 2)
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        other = head_of(qkv, head, (at + HS // 2) % HS, inside, weight, bias, EPS, RMS, HS)
        v = v * c + tl.where(at < HS // 2, -other, other) * s
    return v


@triton.jit
def attend_kernel(
    qkv,
    length,
    keys,
    values,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    cos,
    sin,
    results,
    logsums,
    slots,
    split_slots,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    NH: tl.constexpr,
    NKV: tl.constexpr,
    HS: tl.constexpr,
    HS_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    Attention of the newest token over one split of the slots, for one head of queries of one text; a program
    is (split, head, text). qkv (B, nh + 2 nkv, hs) -> results (B, P, nh, hs), the softmax of the split's
    scores times its values, and logsums (B, P, nh), the logarithm of the sum of exp(score). A split is
    `split_slots` long, a multiple of BLOCK. One that begins past the text has a result of 0 and logsum -inf.

    The newest key and value go to the cache, keys and values (B, slots, nkv, hs), at the text's position.
    """
    split, head, text = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = NH // NKV  # heads of queries that share a head of keys and values
    kv_head = head // group
    at, block = tl.arange(0, HS_P), tl.arange(0, BLOCK)
    inside = at < HS
    position = (tl.load(length + text) - 1).to(tl.int32)  # of the newest token
    qkv += text * ((NH + 2 * NKV) * HS)
    q = rotated(qkv, head, position, q_weight, q_bias, cos, sin, EPS, RMS, HS, HS_P) * (HS**-0.5)
    k_new = rotated(qkv, NH + kv_head, position, k_weight, k_bias, cos, sin, EPS, RMS, HS, HS_P)
    k_new = k_new.to(keys.dtype.element_ty)
    v_new = tl.load(qkv + (NH + NKV + kv_head) * HS + at, mask=inside, other=0.0).to(keys.dtype.element_ty)
    first = text.to(tl.int64) * slots * (NKV * HS) + kv_head * HS  # of the text's keys of this head
    if (head % group == 0) & (position // split_slots == split) & (position < slots):
        newest = first + position.to(tl.int64) * (NKV * HS) + at
        tl.store(keys + newest, k_new, mask=inside)
        tl.store(values + newest, v_new, mask=inside)

    peak, total, summed = float("-inf"), 0.0, tl.zeros((HS_P,), tl.float32)
    for start in range(split * split_slots, min((split + 1) * split_slots, position + 1), BLOCK):
        slot = start + block  # (BLOCK,)
        offsets = first + slot.to(tl.int64)[:, None] * (NKV * HS) + at[None, :]  # (BLOCK, HS_P)
        kept = (slot < position)[:, None] & inside[None, :]
        own = (slot == position)[:, None]  # the newest is not read: another program may write it now
        k = tl.where(own, k_new[None, :], tl.load(keys + offsets, mask=kept, other=0.0)).to(tl.float32)
        v = tl.where(own, v_new[None, :], tl.load(values + offsets, mask=kept, other=0.0)).to(tl.float32)
        score = tl.where(slot <= position, tl.sum(q[None, :] * k, axis=1), float("-inf"))  # (BLOCK,)
        higher = tl.maximum(peak, tl.max(score, axis=0))
        p = tl.exp(score - higher)
        total = total * tl.exp(peak - higher) + tl.sum(p, axis=0)
        summed = summed * tl.exp(peak - higher) + tl.sum(p[:, None] * v, axis=0)
        peak = higher
    part = (text * tl.num_programs(0) + split) * NH + head
    tl.store(results + part * HS + at, summed / tl.where(total == 0, 1.0, total), mask=inside)
    tl.store(logsums + part, peak + tl.log(total))


@triton.jit
def combine_linear_kernel(
    results,
    logsums,
    weight,
    bias,
    x,
    B,
    NH: tl.constexpr,
    NH_P: tl.constexpr,
    HS: tl.constexpr,
    HS_P: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """
    x (B, N) += y weight^T + bias, weight (N, nh hs). y (B, nh hs) is attention over all slots: the mean of
    the splits' results (B, P, nh, hs), each weighted by its sum of exp(score), as logsums (B, P, nh) tell it.
    """
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, NH_P * HS_P)
    head, channel = at // HS_P, at % HS_P
    w = read_rows(weight, rows, head * HS + channel, (head < NH) & (channel < HS), N, NH * HS)
    split, head, channel = tl.arange(0, SPLITS), tl.arange(0, NH_P), tl.arange(0, HS_P)
    part = split[:, None] * NH + head[None, :]  # (P, NH_P)
    at = part[:, :, None] * HS + channel[None, None, :]  # (P, NH_P, HS_P)
    inside = (head < NH)[None, :, None] & (channel < HS)[None, None, :]
    for text in range(B):
        logsum = tl.load(logsums + text * (SPLITS * NH) + part, mask=(head < NH)[None, :], other=0.0)
        share = tl.exp(logsum - tl.max(logsum, axis=0)[None, :])  # split 0 is never empty
        share = share / tl.sum(share, axis=0)[None, :]
        result = tl.load(results + text * (SPLITS * NH * HS) + at, mask=inside, other=0.0)
        y = tl.reshape(tl.sum(share[:, :, None] * result, axis=0), (NH_P * HS_P,))
        add(x + text * N, times(w, y, bias, rows, N), rows, N)


@triton.jit
def linear_kernel(
    h, weight, bias, x, B, N: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr, ROWS: tl.constexpr
):
    """x (B, N) += h weight^T + bias, h (B, K), weight (N, K)"""
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K_P)
    w = read_rows(weight, rows, at, at < K, N, K)
    for text in range(B):
        y = times(w, tl.load(h + text * K + at, mask=at < K, other=0.0), bias, rows, N)
        add(x + text * N, y, rows, N)
