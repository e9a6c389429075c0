"""What a model predicts: noise or v, and whether its schedule ends in pure noise. Said by files, or by the user."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.dreambooth.single_file.layout import Family
from training.weight_files import OpenWeights, WeightsError

PredictionType = Literal["epsilon", "v_prediction"]
_NAMES: Mapping[str, PredictionType] = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Prediction:
    """See the module. said_by: where it was read."""

    kind: PredictionType
    zero_terminal_snr: bool
    said_by: str


def prediction_of_file(file: OpenWeights, family: Family, *, given: PredictionType | None = None) -> Prediction:
    """Return what a single file says: its marker tensors `v_pred` and `ztsnr`, else ModelSpec, else its family.

    Raises WeightsError for an SD 2 that says nothing: 2.0-base and 2.1-base predict noise, 2.0 and 2.1 v, and no key
    tells them apart. given: by the user, who is believed.
    """
    has_zero_snr = "ztsnr" in file.shapes
    if given is not None:
        return Prediction(given, has_zero_snr and given == "v_prediction", "dreambooth.prediction")
    if "v_pred" in file.shapes:
        return Prediction("v_prediction", has_zero_snr, "the file's tensor v_pred")
    said = file.metadata.get("modelspec.prediction_type", "").lower()
    if said in _NAMES:
        return Prediction(_NAMES[said], has_zero_snr, "the file's modelspec.prediction_type")
    architecture = file.metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-768-v"):
        return Prediction("v_prediction", has_zero_snr, "the file's modelspec.architecture")
    if family != "sd2" or architecture.startswith("stable-diffusion-v2-512"):
        return Prediction("epsilon", has_zero_snr, "what models of this family do")
    raise WeightsError(
        f"{file.path}: an SD 2 that does not say what it predicts: set dreambooth.prediction to v_prediction (2.0 and "
        "2.1, made for 768 pixels) or epsilon (2-base and 2.1-base, 512 pixels)"
    )


def prediction_of_scheduler(config: Mapping[str, Any], *, given: PredictionType | None = None) -> Prediction:
    """Return what a diffusers folder's scheduler_config.json says. given: by the user, who is believed."""
    has_zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if given is not None:
        return Prediction(given, has_zero_snr and given == "v_prediction", "dreambooth.prediction")
    said = str(config.get("prediction_type", "epsilon"))
    if said not in _NAMES:
        raise WeightsError(
            f"scheduler_config.json: prediction_type {said!r}: epsilon and v_prediction are trained here"
        )
    return Prediction(_NAMES[said], has_zero_snr, "the folder's scheduler")
