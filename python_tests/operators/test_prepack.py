"""prepack and unprepack: canonical storage to the layout of the device's kernels and back, nothing lost; the maps of
the tensor-core chunk.
"""

import pytest
import torch

from prequant_ext import ops, reference
from support.emulated_kernels import emulated_kernels
from support.operands import assert_identical


@pytest.fixture
def layout(device, request):
    """What prepack and unprepack mean on this device: the CPU's panels, or the tensor-core chunks of the CUDA kernels,
    emulated or not.
    """
    if request.node.callspec.params["device"] == "cpu":
        return reference.prepack, reference.unprepack
    return reference.tensor_core_chunks, reference.canonical_rows


SHAPES = {
    "one code": (1, 1),
    "one chunk": (16, 64),
    "narrower than a panel's word": (16, 8),
    "one row and one column more": (17, 65),
    "odd row bytes": (33, 100),
    "half a chunk": (48, 32),
    "128-bit rows, ragged chunks": (40, 224),
    "nine chunks: more than a block": (7, 9 * 64),
    "minilm feed-forward": (384, 1536),
    "few columns": (5, 31),
    "no rows": (0, 64),
    "no columns": (16, 0),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_identical_to_reference_and_back(shape, bits, device, layout):
    N, K = shape
    prepack, unprepack = layout
    packed = reference.pack(
        torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8), bits
    ).to(device)
    prepacked = ops.prepack(packed, K, bits)
    if N == 0 or (K == 0 and prepack is reference.tensor_core_chunks):
        assert prepacked.numel() == 0 and ops.unprepack(prepacked, N, K, bits).shape == packed.shape
        return
    assert_identical(prepacked, prepack(packed, K, bits))
    assert_identical(ops.unprepack(prepacked, N, K, bits), packed)
    assert_identical(unprepack(prepacked, N, K, bits), packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_off_alignment(bits, device, layout):
    """A view that starts one byte into its storage."""
    N, K = 18, 192
    packed = reference.pack(
        torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(7), dtype=torch.uint8), bits
    )
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()]).to(device)[1:].view_as(packed)
    assert_identical(ops.prepack(shifted, K, bits), layout[0](packed.to(device), K, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_panels_follow_the_maps(bits, formats):
    """Each code of two panels, looked up through formats.h; after the words the rows' sums."""
    N, K = 19, 70
    codes = torch.randint(1, 2**bits, (N, K), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    prepacked = ops.prepack(reference.pack(codes, bits), K, bits)
    per_word, words = formats.word_codes(bits), prepacked.shape[1] - 1
    flat = prepacked.flatten().tolist()

    def word_at(n, w):
        offset = formats.panel_offset(n, w, words)
        return int.from_bytes(bytes(flat[offset : offset + 4]), "little")

    for n in range(32):
        row = codes[n].tolist() + [0] * (words * per_word - K) if n < N else [0] * words * per_word
        for k, code in enumerate(row):
            assert word_at(n, k // per_word) >> formats.word_shift(k % per_word, bits) & (2**bits - 1) == code
        assert word_at(n, words) == sum(row)


# ---- the maps of the tensor-core chunk (csrc/formats.h) --------------------------------------------------------------


@pytest.fixture(scope="module")
def formats():
    """The functions of formats.h."""
    return emulated_kernels()


def test_maps_of_a_chunk_are_one_to_one_and_inverse(formats):
    places = {(n, k): (formats.chunk_lane(n, k), formats.chunk_code(n, k)) for n in range(16) for k in range(64)}
    assert set(places.values()) == {(lane, i) for lane in range(32) for i in range(32)}
    for (n, k), (lane, i) in places.items():
        assert (formats.chunk_row(lane, i), formats.chunk_column(lane, i)) == (n, k)


def test_two_codes_of_one_mma_register_are_16_bits_apart(formats):
    """At 4 bits: columns k and k + 1 of a row, k even, in one word of one lane."""
    for n in range(16):
        for k in range(0, 64, 2):
            assert formats.chunk_lane(n, k) == formats.chunk_lane(n, k + 1)
            low, high = 4 * formats.chunk_code(n, k), 4 * formats.chunk_code(n, k + 1)
            assert high == low + 16 and high // 32 == low // 32


def test_a_word_of_a_lane_is_its_part_of_an_mma_tile(formats):
    """PTX's fragments: lane 4 g + t of B has column g (here a row of W), of A row g and g + 8, at k = 2 t, 2 t + 1 and
    8 more.
    """
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for j in range(4):
            word = {(formats.chunk_row(lane, i), formats.chunk_column(lane, i)) for i in range(8 * j, 8 * j + 8)}
            assert word == {(g + 8 * nn, 16 * j + 8 * kk + 2 * t + s) for nn in (0, 1) for kk in (0, 1) for s in (0, 1)}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_plain_torch_chunks_follow_the_maps(bits, formats):
    """Each code of a few chunks, looked up through formats.h; codes outside the matrix are 0."""
    N, K = 19, 70
    codes = torch.randint(1, 2**bits, (N, K), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    chunks = reference.tensor_core_chunks(reference.pack(codes, bits), K, bits)
    assert chunks.shape == (2, formats.chunks_along(K), formats.chunk_bytes(bits))
    lanes = reference.unpack(chunks.view(-1, formats.lane_bytes(bits)), 32, bits).view(2, 2, 32, 32).tolist()
    for n in range(32):
        for k in range(128):
            lane, i = formats.chunk_lane(n % 16, k % 64), formats.chunk_code(n % 16, k % 64)
            assert lanes[n // 16][k // 64][lane][i] == (codes[n, k].item() if n < N and k < K else 0)


def test_rejects(device, request):
    is_cpu = request.node.callspec.params["device"] == "cpu"
    prepacked = torch.zeros(1, 2, 64, dtype=torch.uint8, device=device)
    wanted = r"\(2, 3, 64\)" if is_cpu else r"\(2, 1, 512\)"
    with pytest.raises(RuntimeError, match=rf"prepacked must have shape {wanted} for N = 17, K = 16"):
        ops.unprepack(prepacked, 17, 16, 4)
    with pytest.raises(RuntimeError, match="prepack has K = 20 but weight_packed packs 16"):
        ops.prepack(torch.zeros(4, 8, dtype=torch.uint8, device=device), 20, 4)


def test_chunks_off_16_bytes_are_refused(device, request):
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("panels are read at any address")
    prepacked = ops.prepack(torch.zeros(16, 32, dtype=torch.uint8, device=device), 64, 4)
    shifted = torch.zeros(prepacked.numel() + 1, dtype=torch.uint8, device=device)[1:].view(prepacked.shape)
    with pytest.raises(
        RuntimeError, match=r"prepacked must lie on a multiple of 16 bytes: clone\(\) makes one that does"
    ):
        ops.unprepack(shifted, 16, 64, 4)
