"""LoRAs by singular values: the best one of a rank for a change of weights, and a smaller one for a LoRA.

Of all matrices of a rank, the sum of the largest singular values' parts is nearest (Eckart and Young, 1936). Factors
share the singular values evenly, so that both are as large as they can be told in 16 bits; alpha is the rank.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.lora.adapter import DOWN, UP, Adapter, AdapterError


@dataclass(frozen=True)
class Reduced:
    """A LoRA and how much of the change it holds: Frobenius norms (square roots of sums of squares)."""

    adapter: Adapter
    whole_norm: float
    kept_norm: float


def reduced_change(change: Tensor, *, rank: int | None, share: float = 1.0) -> Reduced:
    """Return the LoRA of at most `rank` that is nearest to a change of a weight (out, in, …).

    rank: None is no limit. share: of the change's norm that has to be kept, in (0, 1]; the smallest rank that keeps it
    is taken. Computed in fp64; the tensors are fp32.
    """
    kernel = change.shape[1:]
    matrix = change.flatten(1).double()
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    # Eigenvectors of the small Gram matrix: faster than a whole decomposition, and as good as fp32 needs, because the
    # large side is computed from the matrix itself.
    squares, basis = torch.linalg.eigh(tall.T @ tall)
    values, basis = squares.flip(0).clamp_min(0).sqrt(), basis.flip(1)
    other = tall @ basis
    if is_wide:
        return _reduced(basis * values, values, (other / _above_zero(values)).T, rank=rank, share=share, kernel=kernel)
    return _reduced(other, values, basis.T, rank=rank, share=share, kernel=kernel)


def resized(adapter: Adapter, *, rank: int | None, share: float = 1.0, layer: str) -> Reduced:
    """Return a LoRA of at most `rank` that is nearest to one; see `reduced_change`. layer: for messages.

    Raises AdapterError for other kinds: what is nearest to their change is not of their kind.
    """
    if adapter.kind != "lora":
        raise AdapterError(f"{layer}: is a {adapter.kind}; only a LoRA can be resized")
    down, up = adapter.tensors[DOWN].double(), adapter.tensors[UP].double()
    # The product of two thin factors has the singular values of the small matrix between their orthogonal parts.
    out_basis, out_part = torch.linalg.qr(up.flatten(1))
    in_basis, in_part = torch.linalg.qr(down.flatten(1).T)
    left, values, right = torch.linalg.svd(adapter.scale * out_part @ in_part.T, full_matrices=False)
    return _reduced(
        (out_basis @ left) * values, values, right @ in_basis.T, rank=rank, share=share, kernel=down.shape[1:]
    )


def summary(results: Iterable[Reduced]) -> str:
    """Return one line about LoRAs of many layers."""
    known = list(results)
    ranks = [result.adapter.rank or 0 for result in known]
    whole = math.fsum(result.whole_norm**2 for result in known) ** 0.5
    kept = math.fsum(result.kept_norm**2 for result in known) ** 0.5
    share = kept / whole if whole else 1.0
    return f"{len(known):,} layers, ranks {min(ranks)} to {max(ranks)}, {share:.2%} of the change's norm is kept"


def _reduced(
    scaled_left: Tensor, values: Tensor, right: Tensor, *, rank: int | None, share: float, kernel: torch.Size
) -> Reduced:
    energy = values.square().cumsum(0)
    whole = float(energy[-1])
    # A rounding error above nothing, so that a share of 1 does not ask for values that are rounding errors.
    needed = int((energy < share**2 * whole * (1 - 1e-12)).sum()) + 1
    own = max(1, min(needed, len(values), rank or len(values)))
    root = _above_zero(values[:own]).sqrt()
    factors = {
        DOWN: (root[:, None] * right[:own]).reshape(own, *kernel).float().contiguous(),
        UP: (scaled_left[:, :own] / root).reshape(-1, own, *[1] * (len(kernel) - 1)).float().contiguous(),
    }
    return Reduced(Adapter("lora", factors, float(own)), whole**0.5, float(energy[own - 1]) ** 0.5)


def _above_zero(values: Tensor) -> Tensor:
    return values.clamp_min(max(float(values[0]) * 1e-12, 1e-30))
