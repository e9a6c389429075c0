"""Open an ONNX file that the user gave, on the CPU; knows nothing of what it computes."""

from pathlib import Path
from typing import Any


def open_onnx(path: Path) -> Any:
    """Return an onnxruntime session. Raises FileNotFoundError, ValueError (no network, or onnxruntime is missing)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give an ONNX network")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{path}: needs onnxruntime; run `pip install -e '.[cpu]'`") from error
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except (
        states.InvalidProtobuf,
        states.InvalidGraph,
        states.Fail,
        states.NoSuchFile,
        states.NotImplemented,
    ) as error:
        raise ValueError(f"{path}: not a network that onnxruntime opens: {str(error)[:300]}") from error
