"""Signs, packing and unpacking of codes."""

import faiss
import numpy as np
import pytest
import torch

from models.codes import check_bits, pack, signs, unpack


def test_bit_i_of_byte_j_is_code_8j_plus_i() -> None:
    code = -torch.ones(1, 16)
    code[0, [0, 3, 15]] = 0.5
    assert pack(code).tolist() == [[0b00001001, 0b10000000]]


def test_pack_and_unpack_are_inverse_and_agree_with_numpy() -> None:
    codes = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert torch.equal(unpack(packed), signs(codes))
    assert np.array_equal(packed.numpy(), np.packbits(codes.numpy() > 0, axis=1, bitorder="little"))


def test_faiss_sees_the_same_distances() -> None:
    codes = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    index = faiss.IndexBinaryFlat(32)
    index.add(pack(codes).numpy())
    distances, found = index.search(pack(codes).numpy(), 20)
    expected = (32 - signs(codes) @ signs(codes).T) / 2
    for query in range(20):
        assert distances[query].tolist() == expected[query, found[query]].tolist()


def test_zero_is_negative_in_both_forms() -> None:
    zero = torch.zeros(1, 8)
    assert signs(zero).tolist() == [[-1.0] * 8]
    assert pack(zero).item() == 0


@pytest.mark.parametrize("bits", [0, -8, 12, 2048])
def test_unusable_lengths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        check_bits(bits)
