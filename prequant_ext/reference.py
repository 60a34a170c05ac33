"""Every operator in plain torch: the executable specification of ``torch.ops.prequant``.

One function an operator, with the operator's name and arguments; the kernels of every device are tested against these.
Nothing here is tuned, and nothing here imports the compiled extension.

    M tokens   K in_features   N out_features   G scales along K   r outlier dimensions
    weight (N, K)   codes (N, K) uint8   weight_packed (N, ceil(K * container / 8)) uint8
    scale float32, zero_point uint8: (1, 1) per tensor, (N, 1) per row, (N, G) per group of K / G consecutive weights
    axis 1: outlier dimensions are input columns, outlier_weight (N, r);  axis 0: output rows, outlier_weight (r, K)

Equation numbers are those of PreQuant (Gong et al., Findings of ACL 2023).
"""

import math

import torch
from torch import Tensor

TILE = 4096  # elements of a statistics tile
LANES = 32  # partial sums of a tile: element i of a tile belongs to lane i % LANES
ENERGY_UNITS = 2.0**20  # clipping energy is counted in units of sigma^2 / 2^20
# The smallest normal float32, since kernels may flush what is below it. Weights have no smaller scale, and a row of
# activations with a smaller step counts as all zero.
MIN_SCALE = 2.0**-126


def container_bits(bits: int) -> int:
    """Width of the storage container of a ``bits``-wide code: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def row_bytes(K: int, bits: int) -> int:
    """Bytes of a row of K codes in canonical storage."""
    return (K * container_bits(bits) + 7) // 8


# ---- statistics and outliers (Eq. 3, Section 4.3) --------------------------------------------------------------------


def _ordered_sum(tiles: Tensor) -> Tensor:
    """Sum the last dimension of (..., n) float64 in the one order that every device follows.

    Lane l adds its elements l, l + 32, l + 64, ... in turn; then the upper half of the lanes is added to the lower half
    until one is left.
    """
    rows = tiles.unflatten(-1, (-1, LANES))
    lanes = torch.zeros_like(rows[..., 0, :])
    for row in rows.unbind(-2):
        lanes = lanes + row
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    return lanes.squeeze(-1)


def weight_stats(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, population standard deviation, minimum and maximum of each block of ``block_size`` consecutive weights.

    A block is the whole tensor (N * K), a row (K) or a group of a row; the results are float64 in the shape of the
    scales of that granularity. Sums run in float64 over tiles of 4096 elements, two passes a tile, and tiles are merged
    (Chan et al.) in index order. NaN and Inf come out as a non-finite minimum or maximum.
    """
    N, K = weight.shape
    shape = (1, 1) if block_size == N * K else (N, K // block_size)
    blocks = weight.reshape(-1, block_size).double()
    mean = torch.zeros(len(blocks), dtype=torch.float64, device=weight.device)
    squares, count = torch.zeros_like(mean), 0
    for tile in blocks.split(TILE, dim=1):
        size = tile.shape[1]
        padding = (0, -size % LANES)
        tile_mean = _ordered_sum(torch.nn.functional.pad(tile, padding)) / size
        deviation = tile - tile_mean[:, None]
        tile_squares = _ordered_sum(torch.nn.functional.pad(deviation * deviation, padding))
        delta, total = tile_mean - mean, count + size
        mean = mean + delta * (size / total)
        squares = squares + (tile_squares + delta * delta * (count * (size / total)))
        count = total
    # One by one: torch's float64 sqrt on a CPU may be a vector library's, one ulp off.
    std = torch.tensor(
        [math.sqrt(variance) for variance in (squares / count).tolist()], dtype=torch.float64, device=weight.device
    )
    return mean.view(shape), std.view(shape), blocks.amin(1).view(shape), blocks.amax(1).view(shape)


def outlier_counts(
    weight: Tensor, mean: Tensor, std: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outliers ``|w - mean| > threshold * std`` and their clipping energy, for each column and for each row.

    ``mean`` and ``std`` are (1, 1) float64, of the whole matrix. Returns int64 (column_counts, column_energy,
    row_counts, row_energy); energy is the sum of ``(|w - mean| - threshold * std)^2`` in units of ``std^2 / 2^20``,
    rounded for each element, saturating. No outliers where std is 0.
    """
    deviation = (weight.double() - mean).abs()
    limit = threshold * std
    is_outlier = (deviation > limit) & (std > 0)
    excess = torch.where(is_outlier, (deviation - limit) / std, 0.0)
    units = (excess * excess * ENERGY_UNITS).round()
    top = torch.iinfo(torch.int64).max
    energy = torch.where(
        units >= 2.0**63, top, units.clamp(max=2.0**62).long() + (units - units.clamp(max=2.0**62)).long()
    )

    def saturating_sum(dim: int) -> Tensor:
        # exact enough to see an overflow: that is a factor of two away
        wrapped, exact = energy.sum(dim), energy.double().sum(dim)
        return torch.where((wrapped < 0) | (exact >= 2.0**63), top, wrapped)

    return is_outlier.sum(0), saturating_sum(0), is_outlier.sum(1), saturating_sum(1)


def select_outlier_dims(counts: Tensor, energy: Tensor, r: int) -> Tensor:
    """The ``r`` dimensions with most outliers, ascending; ties go to the larger energy, then to the lower index."""
    by_energy = energy.sort(descending=True, stable=True).indices
    by_count = by_energy[counts[by_energy].sort(descending=True, stable=True).indices]
    return by_count[:r].sort().values


# ---- codes and storage (Eq. 1, 2) ------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes -> canonical storage: element k of a row in the lowest free bits first, padding bits 0."""
    container = container_bits(bits)
    per_byte = 8 // container
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).int().unflatten(1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * container
    return (padded << shifts).sum(-1).to(torch.uint8)


def unpack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    """Canonical storage -> (N, K) uint8 codes; the inverse of :func:`pack`."""
    container = container_bits(bits)
    shifts = torch.arange(0, 8, container, device=weight_packed.device, dtype=torch.int32)
    codes = (weight_packed.int().unsqueeze(-1) >> shifts) & (2**container - 1)
    return codes.flatten(1)[:, :K].to(torch.uint8)


def prepack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    """Canonical storage -> the CPU kernels' panels, (ceil(N / 16), words + 1, 64) uint8: 32-bit words of 16 rows side
    by side.

    Word w of a row holds its codes from ``P w`` on, ``P = 32 / container``: code ``P w + 4 i + j`` in byte j at bit
    ``container * i``. After the last word stand 16 int32, the sums of the rows' codes. Missing rows and codes are 0.
    """
    container = container_bits(bits)
    codes = torch.nn.functional.pad(
        unpack(weight_packed, K, bits), (0, -K % (32 // container), 0, -len(weight_packed) % 16)
    ).int()
    shifts = torch.arange(0, 8, container, device=codes.device, dtype=torch.int32)
    words = (codes.view(len(codes), -1, 8 // container, 4) << shifts[:, None]).sum(2).to(torch.uint8)
    sums = codes.sum(1, dtype=torch.int32).view(torch.uint8).view(-1, 1, 4)
    return torch.cat([words, sums], 1).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2).contiguous()


def unprepack(prepacked: Tensor, N: int, K: int, bits: int) -> Tensor:
    """The inverse of :func:`prepack`."""
    container = container_bits(bits)
    words = prepacked[:, :-1].unflatten(2, (16, 4)).transpose(1, 2).flatten(0, 1).int()
    shifts = torch.arange(0, 8, container, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(2) >> shifts[:, None]) & (2**container - 1)
    return pack(codes.flatten(1)[:N, :K].to(torch.uint8), bits)


def tensor_core_chunks(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    """Canonical storage -> the CUDA kernels' chunks, (ceil(N / 16), ceil(K / 64), 128 * container) uint8: 16 rows x 64
    columns, lane by lane.

    Lane 4 g + t holds 32 codes, from the lowest bits up. Code ``i = 8 j + 4 s + 2 kk + nn`` is that of row ``g + 8 nn``
    and column ``16 j + 8 kk + 2 t + s``; missing rows and columns are 0.
    """
    N = len(weight_packed)
    codes = torch.nn.functional.pad(unpack(weight_packed, K, bits), (0, -K % 64, 0, -N % 16))
    nn, g, j, kk, t, s = 1, 2, 4, 5, 6, 7  # dimensions; 0 and 3 count chunks
    lanes = codes.view(-(-N // 16), 2, 8, -(-K // 64), 4, 2, 4, 2).permute(0, 3, g, t, j, s, kk, nn)
    return pack(lanes.reshape(-1, 32), bits).view(-(-N // 16), -(-K // 64), 128 * container_bits(bits))


def canonical_rows(chunks: Tensor, N: int, K: int, bits: int) -> Tensor:
    """The inverse of :func:`tensor_core_chunks`."""
    rows, columns = chunks.shape[:2]
    g, t, j, s, kk, nn = 2, 3, 4, 5, 6, 7
    lanes = unpack(chunks.reshape(-1, 4 * container_bits(bits)), 32, bits).view(rows, columns, 8, 4, 4, 2, 2, 2)
    codes = lanes.permute(0, nn, g, 1, j, kk, t, s).reshape(16 * rows, 64 * columns)
    return pack(codes[:N, :K], bits)


def _spread(blocks: Tensor, N: int, K: int) -> Tensor:
    """(1, 1), (N, 1) or (N, G) -> (N, K): each value over the weights of its block."""
    return blocks.repeat_interleave(K // blocks.shape[1], dim=1).expand(N, K)


def quantize_pack(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, outlier_dims: Tensor, axis: int
) -> Tensor:
    """``q = clip(rint(w / scale) + zero_point, 0, 2^bits - 1)`` (Eq. 1, 2), packed; codes of outlier dimensions are
    zero_point, hence worth exactly 0.
    """
    N, K = weight.shape
    zero = _spread(zero_point, N, K)
    codes = ((weight.float() / _spread(scale, N, K)).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
    if axis == 1:
        codes[:, outlier_dims] = zero[:, outlier_dims]
    else:
        codes[outlier_dims] = zero[outlier_dims]
    return pack(codes, bits)


def _signed_codes(weight_packed: Tensor, zero_point: Tensor, K: int, bits: int) -> Tensor:
    """``q - zero_point`` as (N, K) int32."""
    return unpack(weight_packed, K, bits).int() - _spread(zero_point, len(weight_packed), K).int()


def dequantize(
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    K: int,
    bits: int,
    dtype: torch.dtype,
    row_begin: int = 0,
    row_end: int | None = None,
) -> Tensor:
    """``(q - zero_point) * scale`` in float32, then cast to ``dtype``:
    rows ``row_begin`` up to ``row_end`` of (N, K).
    """
    values = _signed_codes(weight_packed, zero_point, K, bits).float() * _spread(scale, len(weight_packed), K)
    return values[row_begin:row_end].to(dtype)


def scatter_outlier_(
    dense: Tensor, outlier_dims: Tensor, outlier_weight: Tensor, axis: int, accumulate: bool
) -> Tensor:
    """Write (or add) ``outlier_weight`` into the outlier columns (axis 1) or rows (axis 0) of ``dense`` (N, K), in
    place.
    """
    values = outlier_weight.to(dense.dtype)
    if accumulate:
        return dense.index_add_(axis, outlier_dims, values)
    return dense.index_copy_(axis, outlier_dims, values)


# ---- activations and embeddings (Section 4 of the paper; the 8-bit formula is exact, in float32 without contraction) -


def quantize_activations(
    x: Tensor, per_token: bool, group_size: int, excluded_dims: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit min-max codes of ``x`` (M, K), one range a row (``per_token``) or one for all.

        lo = min(min x, 0), hi = max(max x, 0), scale = hi/256 - lo/256, z = clip(rint(-lo * (1/scale)), 0, 255), q =
        clip(rint(x * (1/scale)) + z, 0, 255)

    Returns codes (M, K) uint8, scale float32 and zero_point uint8 ((M, 1) or (1, 1)), sums (M, G) int32 of the codes of
    each group (``group_size`` 0: one group).
    A step below 2^-126 counts as all zero (scale 1, z 0); NaN or Inf gives scale NaN, z 0 and codes 0.
    ``excluded_dims``: columns left out of the range; their codes are z.
    """
    M, K = x.shape
    values = x.float()
    ranged = values
    if excluded_dims is not None:
        ranged = values.index_fill(1, excluded_dims, 0.0)  # 0 is inside every range
    if per_token:
        low, high = (
            (ranged.amin(1, keepdim=True), ranged.amax(1, keepdim=True)) if K else (x.new_zeros(M, 1).float(),) * 2
        )
    else:
        low, high = (
            (ranged.amin().view(1, 1), ranged.amax().view(1, 1)) if x.numel() else (x.new_zeros(1, 1).float(),) * 2
        )
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = high / 256 - low / 256
    finite = torch.isfinite(low) & torch.isfinite(high)
    tiny = scale < MIN_SCALE
    inverse = torch.where(tiny | ~finite, 0.0, 1 / scale)
    zero_point = (-low * inverse).round().clamp(0, 255).nan_to_num(0.0)
    codes = ((ranged * inverse).round() + zero_point).clamp(0, 255).nan_to_num(0.0)
    scale = torch.where(finite, torch.where(tiny, 1.0, scale), float("nan"))
    codes = torch.where(finite, codes, 0.0).to(torch.uint8)
    zero_point = torch.where(finite, zero_point, 0.0).to(torch.uint8)
    sums = (
        codes.unflatten(1, (-1, group_size or K)).sum(-1, dtype=torch.int32)
        if K
        else codes.new_zeros(M, 1, dtype=torch.int32)
    )
    return codes, scale, zero_point, sums


def _dequantize_activations(
    x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """uint8 codes -> ``(q - z) * scale``; float activations as they are."""
    if x_scale is None or x_zero_point is None:
        return x.to(dtype)
    return (x.int() - x_zero_point.int()).to(dtype) * x_scale.to(dtype)


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of an 8-bit table: ``(codes[ids] - zero_point) * scale`` in float32, cast to ``dtype``. scale is (1,
    1) or (V, 1).
    """
    if scale.shape[0] > 1:
        scale, zero_point = scale[ids], zero_point[ids]
    return ((codes[ids].int() - zero_point.int()).float() * scale).to(dtype)


# ---- the linear layer (Section 4.3) ----------------------------------------------------------------------------------


def _accumulator(x: Tensor) -> torch.dtype:
    """float64 in, float64 throughout (the tests' exact answer); everything else accumulates in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _add_outliers(y: Tensor, x: Tensor, outlier_dims: Tensor, outlier_weight: Tensor, axis: int) -> Tensor:
    if axis == 1:
        return y + x[:, outlier_dims] @ outlier_weight.to(y.dtype).T
    return y.index_add(1, outlier_dims, x @ outlier_weight.to(y.dtype).T)


def linear_w4a16(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    bits: int,
    axis: int,
    out_features: int | None = None,
    in_float32: bool | None = None,
) -> Tensor:
    """``y = x W^T`` with ``W = (q - z) * scale``, plus ``x[:, idx] O^T`` (axis 1) or ``y[:, idx] += x O^T`` (axis 0),
    plus bias.

    x (M, K) -> y (M, N) in x's dtype. ``out_features`` names N to kernels whose weight is prepacked; here the rows say
    it. ``in_float32`` False lets a kernel round float32 x to int16 in blocks of 128 columns: an error of at most 2^-15
    * sum over blocks of max|x| * sum|W| in the block.
    """
    high = _accumulator(x)
    weight = dequantize(weight_packed, scale, zero_point, x.shape[1], bits, torch.float32)
    y = _add_outliers(x.to(high) @ weight.to(high).T, x.to(high), outlier_dims, outlier_weight, axis)
    return (y if bias is None else y + bias.to(high)).to(x.dtype)


def linear_w4a8(
    x: Tensor,
    x_codes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_sums: Tensor | None,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    bits: int,
    axis: int,
    raw_outliers: bool,
    out_features: int | None = None,
    per_token: bool = True,
) -> Tensor:
    """:func:`linear_w4a16` on quantized activations: the product of codes is an exact integer, scaled in float at the
    end.

        sum_g float(sum_k (qa - za)(qw - zw)) * scale[n, g], times x_scale[m]

    ``x`` gives y's dtype and receives the gradient (straight-through); its values are read only where ``raw_outliers``
    (axis 1) multiplies O by x[:, idx] itself.
    ``x_sums`` lets kernels fold the zero points in; it adds nothing to the meaning. Without codes x is quantized here,
    as quantize_activations would, ``per_token`` or not.
    """
    high = _accumulator(x)
    if x_codes is None or x_scale is None or x_zero_point is None:
        x_codes, x_scale, x_zero_point, _ = quantize_activations(
            x, per_token, 0, outlier_dims if raw_outliers else None
        )
    K, G = x_codes.shape[1], scale.shape[1]
    # float64 holds these integer sums exactly
    activation = (x_codes.int() - x_zero_point.int()).double().unflatten(1, (G, -1))
    weight = _signed_codes(weight_packed, zero_point, K, bits).double().unflatten(1, (G, -1))
    y = torch.zeros(len(x_codes), len(weight_packed), dtype=high, device=x.device)
    for g in range(G):
        y = y + (activation[:, g] @ weight[:, g].T).to(high) * scale[:, g].to(high)
    y = y * x_scale.to(high)
    source = x.to(high) if raw_outliers else _dequantize_activations(x_codes, x_scale, x_zero_point, high)
    y = _add_outliers(y, source, outlier_dims, outlier_weight, axis)
    return (y if bias is None else y + bias.to(high)).to(x.dtype)


def linear_dx(
    grad_y: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    K: int,
    bits: int,
    axis: int,
    in_float32: bool | None = None,
) -> Tensor:
    """``dx = dy W``, then ``dx[:, idx] += dy O`` (axis 1) or ``dx += dy[:, idx] O`` (axis 0). grad_y (M, N) -> dx (M,
    K), grad_y's dtype.

    ``in_float32`` False lets a kernel round float32 grad_y to int16 in blocks of 128 columns, like linear_w4a16; where
    rows have scales of their own, grad_y times its columns' scales.
    """
    high = _accumulator(grad_y)
    grad = grad_y.to(high)
    dx = grad @ dequantize(weight_packed, scale, zero_point, K, bits, torch.float32).to(high)
    if axis == 1:
        dx = dx.index_add(1, outlier_dims, grad @ outlier_weight.to(high))
    else:
        dx = dx + grad[:, outlier_dims] @ outlier_weight.to(high)
    return dx.to(grad_y.dtype)


def outlier_grad(
    grad_y: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, outlier_dims: Tensor, axis: int
) -> Tensor:
    """Gradient of the outlier weight, float32.

    axis 1: ``dy^T x`` with x (M, r) the activations of the outlier dimensions, already gathered -> (N, r)
    axis 0: ``dy[:, idx]^T x`` with x (M, K) -> (r, K)
    x is float, or uint8 codes with x_scale and x_zero_point.
    """
    high = _accumulator(grad_y)
    grad = grad_y.to(high)
    if axis == 0:
        grad = grad[:, outlier_dims]
    return (grad.T @ _dequantize_activations(x, x_scale, x_zero_point, high)).to(high)


def scale_grad(
    grad_y: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight_packed: Tensor,
    zero_point: Tensor,
    bits: int,
) -> Tensor:
    """PreQuant-alpha: ``dscale[n, g] = sum_m dy[m, n] sum_{k in g} x[m, k] (q - z)[n, k]``, float32 (N, G) with G the
    columns of zero_point.
    """
    high = _accumulator(grad_y)
    K, G = x.shape[1], zero_point.shape[1]
    gradient = grad_y.to(high).T @ _dequantize_activations(x, x_scale, x_zero_point, high)
    return (gradient * _signed_codes(weight_packed, zero_point, K, bits)).unflatten(1, (G, -1)).sum(-1)
