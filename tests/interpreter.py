"""Triton's interpreter with the arithmetic of a GPU: that of Triton 3.6 rounds bf16 towards zero, and fma twice.

Nor does it know numpy 2.4, which makes no number of an array of one element, or how to spread a comparison of scalars
over a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def fma(x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once: to the last bit in fp32, but for one case in 2^50 or so in fp64."""
    x, y, z = np.broadcast_arrays(x, y, z)
    wide = np.float64
    if x.dtype == np.float32:
        p, error = x.astype(wide) * y.astype(wide), 0.0
    else:
        p, error = x * y, _error_of_product(x, y)
    total = p + z
    part = total - p
    rest = (p - (total - part)) + (z.astype(wide) - part) + error
    if x.dtype != np.float32:
        return np.where(np.isfinite(rest), total + rest, total)
    # Rounded to odd first: what is lost to the sum then breaks the ties of the second rounding.
    bits = np.atleast_1d(total).view(np.int64)
    towards = np.where((rest > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + towards, bits).view(wide).reshape(total.shape).astype(np.float32)


def _error_of_product(x: Any, y: Any) -> Any:
    """x * y minus its rounded value (Dekker's product)."""
    high = [(134217729.0 * v) - (134217729.0 * v - v) for v in (x, y)]
    low = [x - high[0], y - high[1]]
    return ((high[0] * high[1] - x * y) + high[0] * low[1] + low[0] * high[1]) + low[0] * low[1]


def repair() -> None:
    """Make the interpreter round as a GPU does, for this process."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    language = interpreter.tl
    cast = builder.cast_impl

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return handle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (language.float32, language.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return handle(rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape), target.scalar)
        if pair == (language.bfloat16, language.float32):
            return handle((source.data.astype(np.uint32) << 16).view(np.float32), target.scalar)
        return cast(self, source, target)

    def create_splat(self: Any, target: Any, scalar: Any) -> Any:
        return handle(np.full(target.shape, scalar.data, dtype=scalar.data.dtype), scalar.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch = interpreter._patch_lang

    patched = set()

    def patch_lang(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor = patch_lang_tensor
    # Once and for good: done for each call of a function, as it is, this takes most of the time.
    interpreter._patch_lang = patch_lang
    builder.create_fma, builder.cast_impl, builder.create_splat = create_fma, cast_impl, create_splat
    np.seterr(all="ignore")  # an overflow is a value, not a warning
