"""Memory in large pages: copies that hold what they are copies of, beside each other and after what gave them out is gone."""

from itertools import pairwise

import torch

from cllm.runtime.huge_pages import LINE, PIECE, HugePages


def test_copies_are_equal_and_lie_apart():
    pages, generator = HugePages(), torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        for shape in ((3, 5), (PIECE - 100,), (0,), (7, 11), (PIECE + 3,), (64,))
    ]
    tensors += [torch.randn(40, 3, generator=generator).T, torch.randn(9, generator=generator).bfloat16()]
    copies = [pages.copy(each) for each in tensors]
    del pages
    assert all(torch.equal(*each) and each[0].dtype == each[1].dtype for each in zip(copies, tensors))
    assert all(each.is_contiguous() and each.data_ptr() % LINE == 0 for each in copies if each.numel())
    spans = sorted((each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in copies if each.numel())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    copies[0].fill_(9)
    assert torch.equal(copies[3], tensors[3])
