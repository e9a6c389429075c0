"""The card's lines about devices and GPU hours."""

from collections.abc import Iterable

from training.device_times import DeviceTime, gpu_hours


def hours_text(hours: float) -> str:
    """Return hours with as many digits as mean something."""
    return f"{hours:.0f}" if hours >= 9.95 else f"{hours:.2g}"


def hours_lines(times: Iterable[DeviceTime]) -> list[str]:
    """Return the card's two lines; with several kinds of devices, each with its hours."""
    times = list(times)
    if not times:
        return ["**GPU used for training**: none yet"]
    parts = "" if len(times) == 1 else f" ({', '.join(f'{hours_text(one.hours)} on {one.name}' for one in times)})"
    return [
        f"**GPU used for training**: {', '.join(one.name for one in times)}  ",
        f"**GPU Hours**: {hours_text(gpu_hours(times))}{parts}",
    ]
