"""Settings of a run: states, to go on, and weights, to use."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from sharding.config import Config
from training.modelspec import check_entries

ExportFormat = Literal["original", "diffusers", "combined", "ckpt"]
_FORMATS: Mapping[str, tuple[ExportFormat, ...]] = {
    "stage_c": ("original", "diffusers", "combined"),
    "dreambooth": ("original", "ckpt", "diffusers"),
}


def formats_of(recipe: str) -> tuple[ExportFormat, ...]:
    """Return the values of `save.export_formats` that a recipe writes."""
    return _FORMATS[recipe]


class SaveConfig(Config):
    """States (to go on) and weights (to use)."""

    FREE: ClassVar = frozenset(
        {
            "every_steps", "keep_states", "keep_chunks", "keep_every_chunks", "asynchronous", "export_every_chunks",
            "keep_exports", "export_dtype", "export_formats", "hub_prior", "hub_decoder", "modelspec", "model_card",
            "training_facts", "licence_files",
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
    export_formats: tuple[ExportFormat, ...] = Field(("original",), min_length=1)
    """original: Stability's, ComfyUI's and kohya's files; ckpt: the same of Stable Diffusion as a pickle of tensors;
    diffusers: a folder; combined: one file of all of stage C for ComfyUI."""
    hub_prior: str | None = None
    """Hub id under which the prior folder will be published, for the decoder's README; without it, its path here."""
    hub_decoder: str | None = None
    """The same of the decoder folder, for the prior's README; without one it names the published decoder."""
    model_card: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """More front matter for README.md of diffusers folders: license, license_name, license_link, tags, …"""
    modelspec: dict[str, str] = Field(default_factory=dict)
    """ModelSpec entries in the header of weights files: author, description, license, tags, merged_from, title, …"""
    training_facts: bool = True
    """Also write how it was trained into the header, as kohya's `ss_*` entries."""
    licence_files: tuple[Path, ...] = ()
    """Files copied into every export."""

    @field_validator("modelspec")
    @classmethod
    def _are_known(cls, entries: dict[str, str]) -> dict[str, str]:
        check_entries(entries)
        return entries
