"""Time on devices, as the ledger holds it: the busy seconds of steps that survived, and the devices at work.

Steps that a kill lost or a rollback undid are in no count, and neither is the time of saves and previews.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from training.chunk_history import histories
from training.ledger import Line

_DEVICES = re.compile(r"(\d+) x (.+)")


@dataclass(frozen=True)
class DeviceTime:
    """What one kind of launch has trained. seconds: of steps, on all devices at once."""

    devices: str
    """`8 x NVIDIA A100`, as in the ledger."""
    seconds: float

    @property
    def count(self) -> int:
        found = _DEVICES.fullmatch(self.devices)
        return int(found[1]) if found else 1

    @property
    def name(self) -> str:
        """As the seed writes it: `8x NVIDIA A100`."""
        found = _DEVICES.fullmatch(self.devices)
        return f"{found[1]}x {found[2]}" if found else self.devices

    @property
    def hours(self) -> float:
        """Times the number of devices."""
        return self.seconds * self.count / 3600


def device_times(lines: Iterable[Line]) -> list[DeviceTime]:
    """Return the time by devices, in the order in which they came. The seconds sum up to those of `totals`."""
    lines, now, found = list(lines), dict[str, str](), dict[str, float]()
    devices_of: dict[int, str] = {}
    for line in lines:
        if line.event == "started":
            now[line.fields["chunk"]] = line.fields["devices"]
        elif line.event in ("state_saved", "chunk_done"):
            devices_of[id(line.fields)] = now.get(line.fields["chunk"], "")
    for history in histories(lines).values():
        if history.status == "superseded":
            continue
        before = 0.0
        for fields in history.saved:
            devices = devices_of[id(fields)]
            found[devices] = found.get(devices, 0.0) + fields["busy_seconds"] - before
            before = fields["busy_seconds"]
    return [DeviceTime(devices, seconds) for devices, seconds in found.items()]


def gpu_hours(times: Iterable[DeviceTime]) -> float:
    """Return the hours of all devices together: an hour on 8 GPUs is 8."""
    return sum(time.hours for time in times)
