"""On a GPU, every case of every operation as a CUDA graph: the bits of the eager call, forward and backward, also when it is replayed."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("a CUDA graph needs a GPU, and PyTorch sees none", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_call_gives_the_bits_of_an_eager_one(case, dtype, oracle, serve):
    serve("triton", case.op)
    tensors = oracle.leaves(case, dtype, dtype)
    wanted = [each for each in tensors.values() if isinstance(each, torch.Tensor) and each.requires_grad]

    def compute() -> list[torch.Tensor]:
        outputs = case.ours(**tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        graded = [out for out in outputs if out.requires_grad]
        gradients = torch.autograd.grad(graded, wanted, [torch.ones_like(out) for out in graded], allow_unused=True) if graded else ()
        return [each.detach() for each in (*outputs, *gradients) if each is not None]

    expected = compute()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    for _ in range(2):
        for each in found:
            each.fill_(float("nan") if each.is_floating_point() else 0)
        graph.replay()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
