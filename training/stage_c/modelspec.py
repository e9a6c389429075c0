"""ModelSpec entries of stage C."""

from collections.abc import Mapping

from training.modelspec import modelspec_of


def modelspec(*, title: str, width: int, height: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the header entries of stage C's weights files; see `training.modelspec`."""
    return modelspec_of(
        architecture="stable-cascade",
        implementation="https://github.com/Stability-AI/StableCascade",
        prediction_type="epsilon",
        title=title,
        width=width,
        height=height,
        extra=extra,
    )
