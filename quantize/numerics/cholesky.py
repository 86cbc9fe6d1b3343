"""Cholesky factorization and solving in place: the Hessian of a wide layer is too large to copy.

LAPACK works in place on column-major matrices. The transpose of a symmetric row-major matrix is
such a matrix, so these functions give it to torch as input and as output, and torch copies nothing.
Called by methods/gptq.py and methods/error_compensation.py.
"""

# Shapes: I = inputs, O = outputs.

from __future__ import annotations

import torch
from torch import Tensor


def factor_(symmetric_II: Tensor) -> Tensor | None:
    """The lower Cholesky factor (I, I). It overwrites the argument, which must be contiguous. None
    when the matrix is not positive definite.
    """
    columns_II = symmetric_II.T
    failed = torch.empty((), dtype=torch.int32, device=columns_II.device)
    torch.linalg.cholesky_ex(columns_II, out=(columns_II, failed))
    # A value that is not finite anywhere in a row makes the row's diagonal not finite.
    return None if failed or not columns_II.diagonal().isfinite().all() else columns_II


def solve_(right_OI: Tensor, lower_II: Tensor) -> Tensor:
    """right_OI times the inverse of the matrix with this lower Cholesky factor. The result
    overwrites right_OI, which must be contiguous.
    """
    columns_IO = right_OI.T
    torch.linalg.solve_triangular(lower_II, columns_IO, upper=False, out=columns_IO)
    torch.linalg.solve_triangular(lower_II.T, columns_IO, upper=True, out=columns_IO)
    return right_OI
