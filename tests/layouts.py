"""Random shapes and memory layouts, for Hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

# Sizes around the edges of vectors, of the memory that small backups share, and of blocks.
DIMENSIONS = st.sampled_from([0, 1, 2, 3, 7, 8, 17, 31])
SHAPES = st.one_of(
    st.lists(DIMENSIONS, min_size=0, max_size=4).filter(lambda s: math.prod(s) <= 2000),
    st.sampled_from([[1009], [67, 71], [3, 5, 8, 8], [16385], [129, 131]]),
)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "odd offset", "strided", "channels_last", "reversed"])


def laid_out(shape: list[int], layout: str, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers in a tensor of that shape which lies in memory as the layout says."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        home = torch.empty([*shape[:-2], shape[-1], shape[-2]], dtype=dtype).transpose(-1, -2)
    elif layout == "odd offset":
        home = torch.empty(values.numel() + 3, dtype=dtype)[3:].view(shape)
    elif layout == "strided" and len(shape) >= 1:
        home = torch.empty([*shape[:-1], 2 * shape[-1] + 1], dtype=dtype)[..., 1::2]
    elif layout == "channels_last" and len(shape) == 4:
        home = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    elif layout == "reversed" and shape:
        home = torch.empty(list(reversed(shape)), dtype=dtype).permute(*reversed(range(len(shape))))
    else:
        home = torch.empty(shape, dtype=dtype)
    return home.copy_(values)


TENSORS = st.lists(st.tuples(SHAPES, LAYOUTS), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
