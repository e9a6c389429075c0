"""An ONNX image model on the device that was asked for, or an error.

onnxruntime falls back to the CPU with no more than a warning when a provider is missing; 5 million images later that
is a lost month. Here the providers in use are checked after the session exists.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from captioning.devices import split_device
from captioning.plugin import Device, MissingExtraError, ModelError

PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {}),
    "rocm": ("ROCMExecutionProvider", {}),
    "migraphx": ("MIGraphXExecutionProvider", {}),
    # 16-bit inference on this provider is known to return nonsense for the WD models.
    "openvino": ("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
    "xpu": ("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
}
_BUILDS = {
    "cpu": "`pip install -e '.[caption,cpu]'`",
    "cuda": "`pip install -e '.[caption,gpu]'` (onnxruntime-gpu, without onnxruntime beside it)",
    "rocm": "AMD's build onnxruntime-rocm in place of onnxruntime",
    "migraphx": "AMD's build onnxruntime-migraphx in place of onnxruntime",
    "openvino": "`pip install onnxruntime-openvino` in place of onnxruntime",
    "xpu": "`pip install onnxruntime-openvino` in place of onnxruntime",
}

MODEL_FILES = ("model.onnx", "model.onnx?data")
"""The model, and the weights of one that is above the format's 2 GB (model.onnx_data, model.onnx.data)."""
OUTPUT_NAMES = ("prediction", "output")
"""Where a file has several outputs (embedding, logits, …), the one with probabilities."""

Layout = Literal["nhwc", "nchw"]


class OnnxSession:
    """A model with one square float32 image input and a chosen output (N, num_values).

    side: pixels; batch_size: the one the file is fixed to, or None; num_values: None where the file does not say.
    """

    def __init__(self, session: Any, *, path: Path, layout: Layout = "nhwc", side: int | None = None, output: str = ""):
        inputs = session.get_inputs()
        shape = inputs[0].shape
        height, width, channels = (1, 2, 3) if layout == "nhwc" else (2, 3, 1)
        expected = "N x side x side x 3" if layout == "nhwc" else "N x 3 x side x side"
        if len(inputs) != 1 or len(shape) != 4 or (isinstance(shape[channels], int) and shape[channels] != 3):
            raise ModelError(f"{path}: expected one input {expected}, found {shape}")
        if inputs[0].type != "tensor(float)":
            raise ModelError(f"{path}: the input is {inputs[0].type}, expected float32; take the float32 file")
        fixed = {it for it in (shape[height], shape[width]) if isinstance(it, int) and it > 0}
        sides = fixed or ({side} if side else set())
        if len(sides) != 1:
            raise ModelError(f"{path}: expected one input {expected} with a fixed side, found {shape}")
        self.side: int = sides.pop()
        # A name or 0 in the first place means any batch size.
        self.batch_size: int | None = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        chosen = _choose_output(session.get_outputs(), output, path=path)
        self.num_values: int | None = chosen.shape[-1] if isinstance(chosen.shape[-1], int) else None
        self._session = session
        self._input = inputs[0].name
        self._output = chosen.name

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the chosen output, (N, num_values) float32."""
        result: npt.NDArray[np.float32] = self._session.run([self._output], {self._input: batch})[0]
        return result


def open_session(
    path: Path, device: Device, *, layout: Layout = "nhwc", side: int | None = None, output: str = ""
) -> OnnxSession:
    """Open `path` on `device`.

    side: pixels of the input, for a file that leaves them open. output: name of the output; empty: the only one, or
    the one named like OUTPUT_NAMES. Raises ModelError for an absent file or provider, another input or output;
    MissingExtraError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", extras="caption,cpu" if device == "cpu" else "caption,gpu") from error
    if not path.is_file():
        raise ModelError(f"{path}: no such model file")
    provider, options = provider_of(device)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ModelError(
            f"annotate.device {device!r} needs onnxruntime's {provider}; this build has {', '.join(available)}: "
            f"install {_BUILDS[split_device(device)[0]]}, or set annotate.device"
        )
    settings = onnxruntime.SessionOptions()
    settings.use_deterministic_compute = True
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, options)])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"{path}: cannot be opened with {provider} ({str(error)[:200]})") from error
    require_provider(session.get_providers(), provider, path=path)
    return OnnxSession(session, path=path, layout=layout, side=side, output=output)


def provider_of(device: Device) -> tuple[str, dict[str, str]]:
    """Return onnxruntime's provider and its options for one of our devices."""
    kind, number = split_device(device)
    provider, options = PROVIDERS[kind]
    if number is None:
        return provider, options
    if kind in ("openvino", "xpu"):
        return provider, options | {"device_type": f"GPU.{number}"}
    return provider, options | {"device_id": str(number)}


def _choose_output(outputs: list[Any], name: str, *, path: Path) -> Any:
    names = [it.name for it in outputs]
    if name:
        found = [it for it in outputs if it.name == name]
    else:
        found = outputs if len(outputs) == 1 else [it for it in outputs if it.name in OUTPUT_NAMES]
    if len(found) != 1:
        what = f"no output {name!r}" if name else "several outputs"
        raise ModelError(f"{path}: {what}; it has {', '.join(names)}: name the one with probabilities or logits")
    return found[0]


def require_provider(in_use: list[str], wanted: str, *, path: Path) -> None:
    """Raise ModelError unless `wanted` comes first among the providers a session uses."""
    if not in_use or in_use[0] != wanted:
        raise ModelError(
            f"{path}: {wanted} was asked for, onnxruntime uses {', '.join(in_use)} instead: check the driver and the "
            "libraries of the provider"
        )
