"""Names of devices: `cpu`, `cuda`, `cuda:1`, …: what a config may say, and what torch and onnxruntime call them.

No library is imported and nothing is looked for here.
"""

from typing import Annotated

from pydantic import AfterValidator

DEVICES = ("cpu", "cuda", "rocm", "migraphx", "openvino", "xpu")
"""rocm and migraphx are AMD, the latter's own ONNX provider; openvino and xpu are two names of Intel's GPUs."""


def split_device(device: str) -> tuple[str, int | None]:
    """Return the kind and the number, None without one. Raises ValueError for a name that is none of ours."""
    kind, colon, number = device.partition(":")
    is_number = number.isascii() and number.isdigit()
    if kind not in DEVICES or (colon and (not is_number or kind == "cpu")):
        raise ValueError(f"device {device!r}: expected one of {', '.join(DEVICES)}, all but cpu also as cuda:1")
    return kind, int(number) if colon else None


def torch_name(device: str) -> str:
    """Return torch's name: AMD's build speaks of cuda, too. Raises ValueError."""
    kind, number = split_device(device)
    base = {"cpu": "cpu", "openvino": "xpu", "xpu": "xpu"}.get(kind, "cuda")
    return base if number is None else f"{base}:{number}"


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices in `cuda:0,cuda:1`. Raises ValueError."""
    devices = tuple(name.strip() for name in text.split(","))
    for device in devices:
        split_device(device)
    if twice := [it for it in devices if it != "cpu" and devices.count(it) > 1]:
        raise ValueError(f"devices: {twice[0]!r} stands twice in {text!r}; give each once")
    return devices


def _checked(device: str) -> str:
    split_device(device)
    return device


DeviceName = Annotated[str, AfterValidator(_checked)]
"""A device's name in a config."""
