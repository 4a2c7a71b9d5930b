"""Embedding on a GPU: rows gathered, and a gradient whose rows are added in the order of their tokens.

N tokens, V rows, E columns. Backward: tokens are sorted (stably), equal ones form runs. A block walks over a fixed number of sorted places; a run
that lies inside is finished there, what belongs to a run across blocks is left as a partial sum, and a second kernel adds those in order.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.torch import as_rows
from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.runtime.gpu import GPU

PIECE = 32  # sorted places of one block
MOST_COLUMNS = 1024


@triton.jit
def gather_kernel(tokens_ptr, weight_ptr, out_ptr, weight_row, weight_column, num_columns, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + place)
    row = tl.load(weight_ptr + token * weight_row + column * weight_column, mask=column < num_columns, other=0.0)
    tl.store(out_ptr + place * num_columns + column, row.to(out_ptr.dtype.element_ty), mask=column < num_columns)


@triton.jit
def pieces_kernel(sorted_ptr, order_ptr, dy_ptr, dweight_ptr, head_ptr, tail_ptr, num_tokens, num_columns, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """head (pieces, E): the sum of the run that came in from the piece before; tail: of the one that goes on into the next piece."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    first = piece * PIECE
    stop = tl.minimum(first + PIECE, num_tokens)
    came_in = (first > 0) & (tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1) == tl.load(sorted_ptr + first))
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(first, stop):
        token = tl.load(sorted_ptr + place)
        total += tl.load(dy_ptr + tl.load(order_ptr + place) * num_columns + column, mask=inside, other=0.0).to(tl.float32)
        after = tl.load(sorted_ptr + place + 1, mask=place + 1 < num_tokens, other=-1)
        ends = after != token
        done = ends | (place + 1 == stop)
        fresh = done & (came_in == 0)  # began in this piece
        tl.store(head_ptr + piece * num_columns + column, total, mask=inside & done & came_in)
        tl.store(dweight_ptr + token * num_columns + column, total.to(dweight_ptr.dtype.element_ty), mask=inside & fresh & ends)
        tl.store(tail_ptr + piece * num_columns + column, total, mask=inside & fresh & (ends == 0))
        came_in = came_in & (done == 0)
        total = tl.where(done, 0.0, total)


@triton.jit
def runs_kernel(sorted_ptr, dweight_ptr, head_ptr, tail_ptr, num_tokens, num_columns, num_pieces, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """The run that begins in piece program_id(0) and goes on beyond: its tail, then the heads of the pieces after, in order."""
    piece = tl.program_id(0).to(tl.int64)
    last = (piece + 1) * PIECE - 1
    if last + 1 < num_tokens:
        token = tl.load(sorted_ptr + last)
        begins_here = tl.load(sorted_ptr + piece * PIECE) != token
        if not begins_here:
            begins_here = piece == 0
            if piece > 0:
                begins_here = tl.load(sorted_ptr + piece * PIECE - 1) != token
        if begins_here:
            if tl.load(sorted_ptr + last + 1) == token:
                column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
                inside = column < num_columns
                total = tl.load(tail_ptr + piece * num_columns + column, mask=inside, other=0.0)
                more = piece + 1
                goes_on = True
                while goes_on:
                    total += tl.load(head_ptr + more * num_columns + column, mask=inside, other=0.0)
                    more += 1
                    goes_on = more < num_pieces
                    if goes_on:
                        goes_on = tl.load(sorted_ptr + more * PIECE) == token
                tl.store(dweight_ptr + token * num_columns + column, total.to(dweight_ptr.dtype.element_ty), mask=inside)


def forward(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens int64 (...), weight (V, E) -> (..., E) in dtype."""
    flat, num_columns = tokens.reshape(-1).contiguous(), weight.shape[1]
    out = torch.empty((*tokens.shape, num_columns), dtype=dtype, device=weight.device)
    if out.numel():
        block = min(next_power_of_2(num_columns), MOST_COLUMNS)
        launch(gather_kernel, (flat.numel(), -(-num_columns // block)), flat, weight, out, *weight.stride(), num_columns, BLOCK=block)
    return out


def backward(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    """dy (..., E) contiguous, tokens int64 (...) -> (V, E) in weight_dtype."""
    rows, num_columns = as_rows(dy), dy.shape[-1]
    dweight = torch.zeros((num_rows, num_columns), dtype=weight_dtype, device=dy.device)
    num_tokens = rows.shape[0]
    if rows.numel() == 0:
        return dweight
    ordered, order = torch.sort(tokens.reshape(-1), stable=True)
    pieces, block = -(-num_tokens // PIECE), min(next_power_of_2(num_columns), MOST_COLUMNS)
    head, tail = (torch.empty((pieces, num_columns), dtype=torch.float32, device=dy.device) for _ in range(2))
    grid = (pieces, -(-num_columns // block))
    launch(pieces_kernel, grid, ordered, order, rows.contiguous(), dweight, head, tail, num_tokens, num_columns, PIECE=PIECE, BLOCK=block)
    launch(runs_kernel, grid, ordered, dweight, head, tail, num_tokens, num_columns, pieces, PIECE=PIECE, BLOCK=block)
    return dweight


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    tokens, master = torch.empty((8, 1024), dtype=torch.int64, device="meta"), torch.empty((50304, 768), device="meta")
    yield "embedding forward", partial(forward, tokens, master, dtype)
    yield "embedding backward", partial(backward, torch.empty((8, 1024, 768), dtype=dtype, device="meta"), tokens, 50304, torch.float32)
