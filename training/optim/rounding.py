"""Round fp32 numbers to bf16 so that small updates are not lost: by chance, or with a memory of what was lost.

At |w| = 0.02 neighbours in bf16 are 1.2e-4 apart, and an update of 1e-5 rounded to nearest is nothing, for ever.

The chance is counted, not streamed: the bits for an element depend on (seed, global step, parameter name, place of the
element in the whole parameter) alone. So rank, device, order and resume cannot change them.
"""

import hashlib
import json

import torch
from torch import Tensor

_BLOCK = 1 << 16  # elements hashed at a time: temporaries stay in the CPU's cache
_LOW_16 = 0xFFFF


def rounding_key(seed: int, global_step: int, name: str) -> tuple[int, int]:
    """Return two 32-bit numbers (signed) that stand for a parameter's rounding in one step."""
    text = json.dumps(["rounding", int(seed), int(global_step), name], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def rounding_bits(key: tuple[int, int], first: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """Return (count,) int32 with values from 0 to 65535 for the elements first … first + count - 1.

    Two rounds of a 32-bit integer hash over the element's number, one per half of the key. Constants: "lowbias32" of
    C. Wellons' hash prospector, 2018, whose bias is 0.17.
    """
    if first + count > 1 << 31:
        raise ValueError(f"a parameter of {first + count:,} elements: rounding counts to 2^31")
    bits = torch.arange(first, first + count, dtype=torch.int32, device=device)
    for half in key:
        bits ^= half
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
            bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)  # a logical shift: torch's keeps the sign
            if factor != 1:
                bits *= factor
    return bits.bitwise_and_(_LOW_16)


def stochastic_bf16(values: Tensor, key: tuple[int, int], *, first: int = 0) -> Tensor:
    """Round fp32 to one of the two nearest bf16 numbers, the nearer the likelier: the mean error is 0.

    values: any shape. first: number of its first element in the whole parameter, for a piece of one. What is not finite
    stays as it is.
    """
    flat = values.reshape(-1)
    rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=values.device)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        bits = rounding_bits(key, first + start, block.numel(), device=values.device)
        bits += block.view(torch.int32)
        bits &= ~_LOW_16  # what is left is a bf16: exact below
        rounded[start : start + _BLOCK] = torch.where(torch.isfinite(block), bits.view(torch.float32), block)
    return rounded.view(values.shape)


def compensated_bf16(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round fp32 to the nearest bf16; return it and what was lost, as another bf16.

    Together they have 16 bits of mantissa. Source: Kahan, "Further remarks on reducing truncation errors", 1965; for
    bf16 weights: Zamirai et al., "Revisiting BFloat16 Training", 2020 (arXiv 2010.06192).
    """
    rounded = values.bfloat16()
    return rounded, (values - rounded.float()).bfloat16()
