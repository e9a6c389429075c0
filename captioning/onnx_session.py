"""An ONNX image model on the device that was asked for, or an error.

onnxruntime falls back to the CPU with no more than a warning when a provider is missing; 5 million images later that
is a lost month. Here the providers in use are checked after the session exists.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captioning.plugin import Device, MissingExtraError, ModelError

PROVIDERS: dict[Device, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {}),
    "rocm": ("ROCMExecutionProvider", {}),
    "migraphx": ("MIGraphXExecutionProvider", {}),
    # 16-bit inference on this provider is known to return nonsense for the WD models.
    "openvino": ("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
}


class OnnxSession:
    """A model with one image input (N, side, side, 3) float32 and a first output (N, num_values)."""

    def __init__(self, session: Any, *, path: Path) -> None:
        inputs = session.get_inputs()
        shape = inputs[0].shape
        if (
            len(inputs) != 1
            or len(shape) != 4
            or shape[3] != 3
            or shape[1] != shape[2]
            or not isinstance(shape[1], int)
        ):
            raise ModelError(f"{path}: expected one input N x side x side x 3 with a fixed side, found {shape}")
        self.side: int = shape[1]
        # A name or 0 in the first place means any batch size.
        self.batch_size: int | None = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self._session = session
        self._input = inputs[0].name
        self._output = session.get_outputs()[0].name

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the first output, (N, num_values) float32."""
        result: npt.NDArray[np.float32] = self._session.run([self._output], {self._input: batch})[0]
        return result


def open_session(path: Path, device: Device) -> OnnxSession:
    """Open `path` on `device`. Raises ModelError for an absent file or provider, MissingExtraError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", extras="caption,cpu" if device == "cpu" else "caption,gpu") from error
    if not path.is_file():
        raise ModelError(f"{path}: no such model file")
    provider, options = PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ModelError(
            f"annotate.device {device!r} needs onnxruntime's {provider}; this build has {', '.join(available)}: "
            "install the build for your device or set annotate.device"
        )
    settings = onnxruntime.SessionOptions()
    settings.use_deterministic_compute = True
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, options)])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"{path}: cannot be opened with {provider} ({str(error)[:200]})") from error
    require_provider(session.get_providers(), provider, path=path)
    return OnnxSession(session, path=path)


def require_provider(in_use: list[str], wanted: str, *, path: Path) -> None:
    """Raise ModelError unless `wanted` comes first among the providers a session uses."""
    if not in_use or in_use[0] != wanted:
        raise ModelError(
            f"{path}: {wanted} was asked for, onnxruntime uses {', '.join(in_use)} instead: check the driver and the "
            "libraries of the provider"
        )
