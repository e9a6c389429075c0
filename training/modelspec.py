"""ModelSpec 1.0.0: what a weights file's header tells people and programs about it. No torch."""

from collections.abc import Mapping

OPTIONAL = ("author", "description", "license", "tags", "date", "merged_from", "timestep_range", "encoder_layer")
"""Entries that may be added to those that are always there."""


def modelspec_of(
    *,
    architecture: str,
    implementation: str,
    prediction_type: str,
    title: str,
    width: int,
    height: int,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return ModelSpec header entries; extra adds some of OPTIONAL, or another title.

    width, height: pixels of the pictures trained on. The date is left to the caller, so that equal weights give equal
    files. Raises ValueError for an entry that ModelSpec does not have. Source: Stability-AI/ModelSpec.
    """
    check_entries(extra or {})
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "implementation": implementation,
        "prediction_type": prediction_type,
        "title": title,
        "resolution": f"{width}x{height}",
        **(extra or {}),
    }
    return {f"modelspec.{key}": value for key, value in values.items()}


def check_entries(entries: Mapping[str, str]) -> None:
    """Raise ValueError for entries that a run cannot state about its weights."""
    if unknown := sorted(entries.keys() - {*OPTIONAL, "title"}):
        raise ValueError(f"modelspec: {', '.join(unknown)} cannot be given; known are title, {', '.join(OPTIONAL)}")
