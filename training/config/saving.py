"""Settings of a run: states, to go on, and weights, to use."""

from typing import ClassVar, Literal

from pydantic import Field

from sharding.config import Config


class SaveConfig(Config):
    """States (to go on) and weights (to use)."""

    FREE: ClassVar = frozenset(
        {
            "every_steps", "keep_states", "keep_chunks", "keep_every_chunks", "asynchronous", "export_every_chunks",
            "keep_exports", "export_dtype",
        }
    )  # fmt: skip

    every_steps: int = Field(256, gt=0)
    """Save a state whenever the global step is a multiple of this; one is always saved at the end of a chunk."""
    keep_states: int = Field(2, ge=1)
    """Verified states kept within a chunk; older ones are removed only after a newer one is verified."""
    keep_chunks: int = Field(2, ge=1)
    """Finished chunks whose final state is kept, so that a branch can start there."""
    keep_every_chunks: int = Field(0, ge=0)
    """Besides, keep the final state of every n-th chunk for good; 0 keeps none."""
    asynchronous: bool = True
    """Write states in the background while training goes on; costs one copy of them in CPU memory."""
    export_every_chunks: int = Field(1, ge=0)
    """Export weights after every n-th chunk; 0 exports only on command."""
    keep_exports: int = Field(0, ge=0)
    """Keep the weights of this many of the newest exported chunks; 0 keeps all."""
    export_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of exported weights; values that overflow or vanish are counted."""
