"""ModelSpec 1.0.0: what a weights file's header tells people and programs about it."""

from collections.abc import Mapping


def modelspec(*, title: str, width: int, height: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ModelSpec 1.0.0 header entries for stage C; extra adds or replaces entries (without `modelspec.`).

    width, height: pixels of the pictures trained on. The date is left to the caller, so that equal weights give equal
    files. Source: Stability-AI/ModelSpec.
    """
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-cascade",
        "implementation": "https://github.com/Stability-AI/StableCascade",
        "prediction_type": "epsilon",
        "title": title,
        "resolution": f"{width}x{height}",
        **(extra or {}),
    }
    return {f"modelspec.{key}": value for key, value in values.items()}
