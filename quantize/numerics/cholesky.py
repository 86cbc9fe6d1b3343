"""Cholesky factors in the matrix's own memory: of the Hessian of a wide layer, every copy counts.

LAPACK works in place on matrices that lie column by column, and a symmetric one lies both ways: its
transpose is handed to torch as input and as output, which then copies nothing. Called by `gptq` and
`correction`.
"""

# Shapes: I = inputs, O = outputs.

from __future__ import annotations

import torch
from torch import Tensor


def factor_(symmetric_II: Tensor) -> Tensor | None:
    """The lower Cholesky factor, (I, I), in the memory of the contiguous argument, which is lost;
    None where it is not positive definite.
    """
    columns_II = symmetric_II.T
    failed = torch.empty((), dtype=torch.int32, device=columns_II.device)
    torch.linalg.cholesky_ex(columns_II, out=(columns_II, failed))
    # What is not finite anywhere in a row reaches its diagonal.
    return None if failed or not columns_II.diagonal().isfinite().all() else columns_II


def solve_(right_OI: Tensor, lower_II: Tensor) -> Tensor:
    """right_OI times the inverse of the matrix with this lower factor, in the memory of the
    contiguous right_OI.
    """
    columns_IO = right_OI.T
    torch.linalg.solve_triangular(lower_II, columns_IO, upper=False, out=columns_IO)
    torch.linalg.solve_triangular(lower_II.T, columns_IO, upper=True, out=columns_IO)
    return right_OI
