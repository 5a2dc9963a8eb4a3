"""The Triton kernels: mixing, the per-sample convolution as an implicit matrix product, and their gradients.

Maps lie channels-last, (B, H, W, C). W lies as (n, k, O, C/g), mixed kernels as (B, k, O, C/g), with the k taps of a
kernel row by row, so that neighbours in memory are neighbours in a channel. `filters` and `channels` are those of one
group. Every sum runs in a fixed order: blocks write partial sums, none adds to another's.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Sizes of which one compiled kernel serves all; of channels and filters it is compiled for multiples of 16, or for any.
BATCH = ("batch", "samples", "n", "taps", "groups")
MAPS = ("in_h", "in_w", "out_h", "out_w", "groups")


@triton.jit
def weight_tile(
    group, filters, channels, groups, tap, filter_block, channel_block, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the filters and input channels of one block, where it lies in a kernel, and which of it exists."""
    o = filter_block * BLOCK_O + tl.arange(0, BLOCK_O)
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = ((tap * groups + group) * filters + o)[:, None] * channels + c[None, :]
    return o, c, at, (o < filters)[:, None] & (c < channels)[None, :]


@triton.jit(do_not_specialize=BATCH)
def mix_kernel(
    weight, kernel, spatial, channel, filter, mixed, batch, samples, n, taps, groups, filters, channels,
    N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """mixed[b] = filter[b] * channel[b] * spatial[b] * sum_i kernel[b, i] * weight[i]: a block of W, some samples."""
    pid = tl.program_id(0)
    blocks_c, blocks_o = tl.cdiv(channels, BLOCK_C), tl.cdiv(filters, BLOCK_O)
    channel_block, filter_block = pid % blocks_c, pid // blocks_c % blocks_o
    group, tap = pid // (blocks_c * blocks_o) % groups, pid // (blocks_c * blocks_o * groups)
    o, c, at, inside = weight_tile(group, filters, channels, groups, tap, filter_block, channel_block, BLOCK_O, BLOCK_C)
    i, size = tl.arange(0, N), taps * groups * filters * channels
    w = tl.load(weight + i[:, None, None] * size + at[None], (i < n)[:, None, None] & inside[None], 0).to(SUM)
    first = tl.program_id(1) * samples
    for b in range(first, tl.minimum(first + samples, batch)):
        if kernel is None:
            tile = tl.sum(w, 0)
        else:
            tile = tl.sum(w * tl.load(kernel + b * n + i, i < n, 0).to(SUM)[:, None, None], 0)
        if spatial is not None:
            tile *= tl.load(spatial + b * taps + tap).to(SUM)
        if channel is not None:
            tile *= tl.load(channel + (b * groups + group) * channels + c, c < channels, 0).to(SUM)[None, :]
        if filter is not None:
            tile *= tl.load(filter + (b * groups + group) * filters + o, o < filters, 0).to(SUM)[:, None]
        tl.store(mixed + b * size + at, tile.to(mixed.dtype.element_ty), inside)


@triton.jit(do_not_specialize=BATCH)
def mix_gradient_kernel(
    grad, weight, kernel, spatial, channel, filter, d_weight, d_kernel, d_spatial, d_channel, d_filter,
    batch, samples, n, taps, groups, filters, channels,
    N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of mix_kernel for `grad`, that of the mixed kernels.

    Adds to d_weight, (splits, n, k, O, C/g), and writes partial sums, to be summed over the second axis: d_kernel
    (B, blocks, n), d_spatial (B, blocks / k, k), d_channel (B, k * blocks of filters, C), d_filter (B, k * blocks of
    channels, O).
    """
    pid = tl.program_id(0)
    blocks_c, blocks_o = tl.cdiv(channels, BLOCK_C), tl.cdiv(filters, BLOCK_O)
    channel_block, filter_block = pid % blocks_c, pid // blocks_c % blocks_o
    group, tap = pid // (blocks_c * blocks_o) % groups, pid // (blocks_c * blocks_o * groups)
    o, c, at, inside = weight_tile(group, filters, channels, groups, tap, filter_block, channel_block, BLOCK_O, BLOCK_C)
    i, size = tl.arange(0, N), taps * groups * filters * channels
    at_n, inside_n = i[:, None, None] * size + at[None], (i < n)[:, None, None] & inside[None]
    w = tl.load(weight + at_n, inside_n, 0).to(SUM)
    d_weight += tl.program_id(1) * n * size
    d_w = tl.load(d_weight + at_n, inside_n, 0)
    first = tl.program_id(1) * samples
    for b in range(first, tl.minimum(first + samples, batch)):
        g = tl.load(grad + b * size + at, inside, 0).to(SUM)
        # g times the attentions, and g times the mixture of W: each gradient is a sum over one of the two
        if filter is None:
            by_filter = tl.full((BLOCK_O, 1), 1, SUM)
        else:
            by_filter = tl.load(filter + (b * groups + group) * filters + o, o < filters, 0).to(SUM)[:, None]
        if channel is None:
            by_channel = tl.full((1, BLOCK_C), 1, SUM)
        else:
            by_channel = tl.load(channel + (b * groups + group) * channels + c, c < channels, 0).to(SUM)[None, :]
        by_tap = tl.full((), 1, SUM) if spatial is None else tl.load(spatial + b * taps + tap).to(SUM)
        scaled = g * by_filter * by_channel * by_tap
        if kernel is None:
            d_w += scaled[None]
            mixture = g * tl.sum(w, 0)
        else:
            share = tl.load(kernel + b * n + i, i < n, 0).to(SUM)[:, None, None]
            d_w += scaled[None] * share
            mixture = g * tl.sum(w * share, 0)
            shares = tl.sum(tl.sum(w * scaled[None], 2), 1)
            tl.store(d_kernel + (b * tl.num_programs(0) + pid) * n + i, shares, i < n)
        if spatial is not None:
            total = tl.sum(tl.sum(mixture * by_filter * by_channel, 1), 0)
            blocks = blocks_c * blocks_o * groups
            tl.store(d_spatial + (b * blocks + pid % blocks) * taps + tap, total)
        if channel is not None:
            row = ((b * taps + tap) * blocks_o + filter_block) * groups + group
            tl.store(d_channel + row * channels + c, tl.sum(mixture * by_filter * by_tap, 0), c < channels)
        if filter is not None:
            row = ((b * taps + tap) * blocks_c + channel_block) * groups + group
            tl.store(d_filter + row * filters + o, tl.sum(mixture * by_channel * by_tap, 1), o < filters)
    tl.store(d_weight + at_n, d_w, inside_n)


@triton.jit
def seen(
    out, tap, extent, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Which row (or column) of the input a tap sees from `out`, and whether there is one.

    Transposed it is the other way round: the output row into which the tap carries input row `out`.
    """
    if TRANSPOSED:
        at = out + PADDING - tap * DILATION
        there = (at >= 0) & (at % STRIDE == 0)
        at = at // STRIDE
    else:
        at = out * STRIDE - PADDING + tap * DILATION
        there = at >= 0
    return at, there & (at < extent)


@triton.jit(do_not_specialize=MAPS)
def conv_kernel(
    source, mixed, out, in_h, in_w, out_h, out_w, groups, depth, width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TRANSPOSED: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Convolve with one kernel per sample; transposed, compute the gradient of the input.

    In each sample and group, (positions, k * depth) times (k * depth, width): depth counts channels and width filters,
    transposed the other way round. A program writes rows STEP_H apart (columns STEP_W): transposed, all of
    them meet the same few taps of a strided convolution.
    """
    pid = tl.program_id(0)
    rows, cols = tl.cdiv(out_h, STEP_H), tl.cdiv(out_w, STEP_W)
    blocks_m, blocks_n = tl.cdiv(rows * cols, BLOCK_M), tl.cdiv(width, BLOCK_N)
    m, pid = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M), pid // blocks_m
    n, pid = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N), pid // blocks_n
    phase_w, pid = pid % STEP_W, pid // STEP_W
    phase_h, pid = pid % STEP_H, pid // STEP_H
    group, sample = pid % groups, (pid // groups).to(tl.int64)

    oh, ow = m // cols * STEP_H + phase_h, m % cols * STEP_W + phase_w
    inside = (oh < out_h) & (ow < out_w)
    source += sample * in_h * in_w * groups * depth + group * depth
    mixed += (sample * KH * KW * groups + group) * depth * width
    first_h, first_w = (phase_h + PH) % STEP_H, (phase_w + PW) % STEP_W
    taps_h, taps_w = tl.cdiv(KH - first_h, STEP_H), tl.cdiv(KW - first_w, STEP_W)
    blocks_k = tl.cdiv(depth, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for step in range(taps_h * taps_w * blocks_k):
        tap, k = step // blocks_k, step % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
        kh, kw = first_h + tap // taps_w * STEP_H, first_w + tap % taps_w * STEP_W
        ih, there_h = seen(oh, kh, in_h, SH, PH, DH, TRANSPOSED)
        iw, there_w = seen(ow, kw, in_w, SW, PW, DW, TRANSPOSED)
        there = (inside & there_h & there_w)[:, None] & (k < depth)[None, :]
        a = tl.load(source + (ih * in_w + iw)[:, None] * (groups * depth) + k[None, :], there, 0)
        at = k[:, None] * width + n[None, :] if TRANSPOSED else k[:, None] + n[None, :] * depth
        one_tap = mixed + (kh * KW + kw) * groups * depth * width
        b = tl.load(one_tap + at, (k < depth)[:, None] & (n < width)[None, :], 0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = (oh * out_w + ow)[:, None] * (groups * width) + n[None, :]
    out += sample * out_h * out_w * groups * width + group * width
    tl.store(out + at, total.to(out.dtype.element_ty), inside[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=MAPS)
def conv_gradient_kernel(
    grad, x, d_mixed, in_h, in_w, out_h, out_w, groups, filters, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of each sample's kernel: for each tap, (filters, positions) times (positions, channels)."""
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(filters, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    o, pid = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M), pid // blocks_m
    c, pid = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N), pid // blocks_n
    tap, pid = pid % (KH * KW), pid // (KH * KW)
    group, sample = pid % groups, (pid // groups).to(tl.int64)
    kh, kw = tap // KW, tap % KW
    grad += sample * out_h * out_w * groups * filters + group * filters
    x += sample * in_h * in_w * groups * channels + group * channels
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, out_h * out_w, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        inside = m < out_h * out_w
        ih, there_h = seen(m // out_w, kh, in_h, SH, PH, DH, False)
        iw, there_w = seen(m % out_w, kw, in_w, SW, PW, DW, False)
        a = tl.load(grad + o[:, None] + m[None, :] * (groups * filters), (o < filters)[:, None] & inside[None, :], 0)
        there = (inside & there_h & there_w)[:, None] & (c < channels)[None, :]
        b = tl.load(x + (ih * in_w + iw)[:, None] * (groups * channels) + c[None, :], there, 0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = o[:, None] * channels + c[None, :]
    d_mixed += ((sample * KH * KW + tap) * groups + group) * filters * channels
    tl.store(d_mixed + at, total.to(d_mixed.dtype.element_ty), (o < filters)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=MAPS)
def depthwise_kernel(
    source, mixed, out, in_h, in_w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """conv_kernel where every channel is a group: no matrices to multiply, the taps are summed one by one."""
    pid = tl.program_id(0)
    blocks_c, blocks_m = tl.cdiv(channels, BLOCK_C), tl.cdiv(out_h * out_w, BLOCK_M)
    c, pid = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C), pid // blocks_c
    m, sample = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M), (pid // blocks_m).to(tl.int64)
    inside = m < out_h * out_w
    source += sample * in_h * in_w * channels
    mixed += sample * KH * KW * channels
    total = tl.zeros((BLOCK_M, BLOCK_C), SUM)
    for tap in range(KH * KW):
        ih, there_h = seen(m // out_w, tap // KW, in_h, SH, PH, DH, TRANSPOSED)
        iw, there_w = seen(m % out_w, tap % KW, in_w, SW, PW, DW, TRANSPOSED)
        there = (inside & there_h & there_w)[:, None] & (c < channels)[None, :]
        a = tl.load(source + (ih * in_w + iw)[:, None] * channels + c[None, :], there, 0).to(SUM)
        total += a * tl.load(mixed + tap * channels + c, c < channels, 0).to(SUM)[None, :]
    at = m[:, None] * channels + c[None, :]
    out += sample * out_h * out_w * channels
    tl.store(out + at, total.to(out.dtype.element_ty), inside[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=MAPS)
def depthwise_gradient_kernel(
    grad, x, d_mixed, in_h, in_w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of each sample's depth-wise kernel; TAPS is a power of two, at least the taps."""
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c, sample = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C), (pid // blocks_c).to(tl.int64)
    grad += sample * out_h * out_w * channels
    x += sample * in_h * in_w * channels
    taps = tl.arange(0, TAPS)[:, None]
    total = tl.zeros((TAPS, BLOCK_C), SUM)
    for start in range(0, out_h * out_w, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < out_h * out_w)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + m[:, None] * channels + c[None, :], inside, 0).to(SUM)
        for tap in range(KH * KW):
            ih, there_h = seen(m // out_w, tap // KW, in_h, SH, PH, DH, False)
            iw, there_w = seen(m % out_w, tap % KW, in_w, SW, PW, DW, False)
            there = inside & (there_h & there_w)[:, None]
            a = tl.load(x + (ih * in_w + iw)[:, None] * channels + c[None, :], there, 0).to(SUM)
            total += tl.where(taps == tap, tl.sum(a * g, 0)[None, :], 0)
    at = taps * channels + c[None, :]
    d_mixed += sample * KH * KW * channels
    tl.store(d_mixed + at, total.to(d_mixed.dtype.element_ty), (taps < KH * KW) & (c < channels)[None, :])
