"""ModelSpec entries of Stable Diffusion: the architecture and what it predicts follow from the model."""

from collections.abc import Mapping

from training.dreambooth.sd_models.models import SdModel
from training.dreambooth.single_file.layout import Family
from training.dreambooth.single_file.writing import MARKERS
from training.modelspec import modelspec_of

_IMPLEMENTATION: Mapping[Family, str] = {
    "sd1": "https://github.com/CompVis/stable-diffusion",
    "sd2": "https://github.com/Stability-AI/stablediffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}
_SIDES: Mapping[Family, int] = {"sd1": 512, "sd2": 768, "sdxl": 1024}
_FREE = ("modelspec.title", "modelspec.resolution")
"""Entries that do not follow from the model."""


def sd_modelspec(
    model: SdModel,
    *,
    title: str,
    width: int | None = None,
    height: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the header entries of a model's weights files; see `training.modelspec`. The hash is added on writing.

    width, height: pixels of the pictures trained on; default: of the family's published models.
    """
    width, height = width or _SIDES[model.family], height or _SIDES[model.family]
    return modelspec_of(
        architecture=architecture_of(model),
        implementation=_IMPLEMENTATION[model.family],
        prediction_type="v" if model.prediction.kind == "v_prediction" else "epsilon",
        title=title,
        width=width,
        height=height,
        extra=extra,
    )


def whole_header(model: SdModel, header: Mapping[str, str], *, title: str) -> dict[str, str]:
    """Return a header with all of ModelSpec; what follows from the model is the model's, whatever the header says."""
    own = sd_modelspec(model, title=title)
    return {**own, **header, **{key: text for key, text in own.items() if key not in _FREE}}


def architecture_of(model: SdModel) -> str:
    """Return ModelSpec's name of the architecture."""
    if model.family == "sd2":
        return f"stable-diffusion-v2-{'768-v' if model.prediction.kind == 'v_prediction' else '512'}"
    return {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[model.family]


def markers_of(model: SdModel) -> tuple[str, ...]:
    """Return the marker tensors that say what the model predicts; the only place for it in a .ckpt."""
    if model.prediction.kind != "v_prediction":
        return ()
    return MARKERS if model.prediction.zero_terminal_snr else MARKERS[:1]
