"""annotate: a tagger and four scorers on camera-size JPEGs, beside the same models run one script after the other.

The models cost nothing, so that decoding and resizing are all there is, as on a GPU. Two sets:

    shared      WD tagger, aesthetic-shadow, and three heads on CLIP embeddings (aes-B32, LAION, waifu-scorer), which
                the same 224 x 224 pixels are prepared for
    different   WD tagger, aesthetic-shadow, one CLIP head, anime aesthetic, style age: only the decode is common

Each peer script opens, decodes and resizes every picture by itself with Pillow, as the references do, in one process.
Ratios are of CPU seconds in one process (ours: decoding in a thread), rounds alternating, the best of three.
Then one decode worker is pinned to one core and the models to another, with models that cost about a decode.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from captioning.annotate import annotate
from captioning.config import CaptioningConfig
from captioning.plugin import Device, Identity, ModelSettings, Pixels, Preparer, Row
from captioning.preparers import CentreCrop, Squash
from captioning.registry import PLUGINS
from captioning.scorers.base import score_rows
from captioning.taggers.square import SquarePreparer
from scripts.bench.result import Bar, Result
from scripts.bench.scan import make_pictures
from sharding import images
from sharding.config import parse_config
from sharding.schema import MANIFEST, SCORES, Workspace
from sharding.tables import part_name, write_part

_DEMO = Path(__file__).parents[1] / "demo_pictures"
_REPEATS = 3
_BATCH_SIZE = 4
_WORK = bytes(1 << 19)
_BICUBIC, _BILINEAR = int(Image.Resampling.BICUBIC), int(Image.Resampling.BILINEAR)
PREPARERS: dict[str, Preparer] = {
    "tagger": SquarePreparer(448),
    "aesthetic": Squash(1024, 1024, _BILINEAR),
    "clip": CentreCrop(224, 224),
    "clip_2": CentreCrop(224, 224),
    "clip_3": CentreCrop(224, 224),
    "anime_aesthetic": Squash(448, 448, _BICUBIC),
    "style_age": Squash(384, 384, _BICUBIC),
}
SETS = {
    "shared": ("tagger", "aesthetic", "clip", "clip_2", "clip_3"),
    "different": ("tagger", "aesthetic", "clip", "anime_aesthetic", "style_age"),
}


def run(*, full: bool, data: Path | None) -> Result:
    """Measure and return the figures. full: 24 pictures instead of 4, 96 instead of 24 where cores are pinned."""
    figures: dict[str, float] = {}
    notes = [
        "bound_…: (sum of the peers' decodes and resizes) / (one decode and each different resize once)",
        "pinned: by the clock, worthless on a machine that does other work, too; device_share: the models wait, "
        "as for a GPU, as long as decoding takes",
        "min_side_1024: scaled decoding, an option whose scores move a little",
    ]
    with tempfile.TemporaryDirectory() as temporary, _plugin():
        folder = Path(temporary)
        paths = make_pictures(folder, data or _DEMO, num_pictures=24 if full else 4)["baseline"]
        for name, models in SETS.items():
            figures |= _ratios(name, models, paths, folder)
        if len(os.sched_getaffinity(0)) > 1:
            figures |= _pinned((paths * 16)[: 96 if full else 24], folder)
        else:
            notes.append("one core only: nothing was pinned")
    bars = [Bar("decodes_per_image", at_most=1), Bar("ratio_shared", at_least=2.5)]
    bars += [Bar("pinned_share", at_least=0.9)] if "pinned_share" in figures else []
    return Result("annotate", figures, bars, full_size=full, peer=f"Pillow {version('pillow')}", notes=notes)


# --- against scripts run one after the other ---


def _rounds(models: Sequence[str], paths: Sequence[Path], where: Path) -> dict[str, Callable[[], object]]:
    return {
        "peers": lambda: _peer_scripts(models, paths),
        "ours": lambda: _annotate(models, paths, where / "exact"),
        "scaled": lambda: _annotate(models, paths, where / "scaled", min_side=1024),
        "decode": lambda: [images.decode_rgb(path.read_bytes()) for path in paths] and None,
        "model": lambda: _look(models, len(paths)),
    }


def _ratios(name: str, models: Sequence[str], paths: Sequence[Path], folder: Path) -> dict[str, float]:
    best: dict[str, float] = {}
    num_decodes = 0
    for number in range(_REPEATS):
        where = folder / f"{name}-{number}"
        for what, call in _rounds(models, paths, where).items():
            started = time.process_time()
            answer = call()
            seconds = time.process_time() - started
            best[what] = min(best.get(what, seconds), seconds)
            num_decodes = max(num_decodes, answer) if isinstance(answer, int) else num_decodes
    picture = images.decode_rgb(paths[0].read_bytes())
    resizes = {it: _seconds(PREPARERS[it].prepare, picture) for it in models}
    decode = best["decode"] / len(paths)
    once = {PREPARERS[it]: seconds for it, seconds in resizes.items()}
    return {
        "decodes_per_image": num_decodes / len(paths),
        f"ratio_{name}": best["peers"] / best["ours"],
        f"bound_{name}": (decode * len(models) + sum(resizes.values())) / (decode + sum(once.values())),
        f"ratio_{name}_min_side_1024": best["peers"] / best["scaled"],
        f"{name}_peers_ms_per_image": best["peers"] / len(paths) * 1000,
        f"{name}_ours_ms_per_image": best["ours"] / len(paths) * 1000,
        "decode_only_ms_per_image": decode * 1000,
        f"{name}_resize_only_ms_per_image": sum(once.values()) * 1000,
        f"{name}_model_only_ms_per_image": best["model"] / len(paths) * 1000,
    }


def _peer_scripts(models: Sequence[str], paths: Sequence[Path]) -> None:
    """Model after model: open, decode, resize and look at every picture, as a script of its own does."""
    for model in models:
        light = Light(model)
        for start in range(0, len(paths), _BATCH_SIZE):
            pictures = [Image.open(path).convert("RGB") for path in paths[start : start + _BATCH_SIZE]]
            light.predict(np.stack([_as_peers_do(model, picture) for picture in pictures]))


def _as_peers_do(model: str, picture: Image.Image) -> Pixels:
    if model != "tagger":
        return np.asarray(PREPARERS[model].prepare(picture))
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    return np.asarray(square.resize((448, 448), Image.Resampling.BICUBIC))[:, :, ::-1]


def _look(models: Sequence[str], num_images: int) -> None:
    for model in models:
        batch = np.zeros((_BATCH_SIZE, PREPARERS[model].min_side, PREPARERS[model].min_side, 3), np.uint8)
        for _ in range(0, num_images, _BATCH_SIZE):
            Light(model).predict(batch)


def _seconds(call: Callable[[Any], object], argument: object) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.process_time()
        call(argument)
        best = min(best, time.process_time() - started)
    return best


# --- one core decodes, the other one runs the models ---


def _pinned(paths: Sequence[Path], folder: Path) -> dict[str, float]:
    """Return images/s of either side alone and of both at once."""
    cores = sorted(os.sched_getaffinity(0))
    models = SETS["shared"]
    picture = images.decode_rgb(paths[0].read_bytes())
    decode = _seconds(lambda path: images.decode_rgb(path.read_bytes()), paths[0])
    decode += sum({PREPARERS[it]: _seconds(PREPARERS[it].prepare, picture) for it in models}.values())
    cost = 0.95 * decode / len(models)
    os.sched_setaffinity(0, {cores[1]})
    try:
        decode_only = _rate(models, paths, folder / "decode-only", core=cores[0], cost=0.0)
        started, num_batches = time.perf_counter(), 4
        for _ in range(num_batches):
            _busy(cost * _BATCH_SIZE * len(models))
        model_only = num_batches * _BATCH_SIZE / (time.perf_counter() - started)
        together = _rate(models, paths, folder / "together", core=cores[0], cost=cost)
        device_cost = 1 / decode_only / len(models)
        on_device = _rate(models, paths, folder / "device", core=cores[0], cost=device_cost, is_device=True)
    finally:
        os.sched_setaffinity(0, cores)
    return {
        "pinned_decode_only_images_per_second": decode_only,
        "pinned_model_only_images_per_second": model_only,
        "pinned_together_images_per_second": together,
        "pinned_share": together / min(decode_only, model_only),
        "device_share": on_device / decode_only,
    }


def _rate(
    models: Sequence[str], paths: Sequence[Path], where: Path, *, core: int, cost: float, is_device: bool = False
) -> float:
    """Return images/s from the first batch to the last: starting a worker is not what is asked."""
    Light.batch_times.clear()
    _annotate(models, paths, where, core=core, cost=cost, is_device=is_device)
    times = Light.batch_times[len(models) - 1 :: len(models)]
    return (len(times) - 1) * _BATCH_SIZE / (times[-1] - times[0])


def _busy(seconds: float) -> None:
    """Keep this core busy for so much CPU time, as models do: without holding Python's lock."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(_WORK)


# --- models that cost nothing, or so much CPU time ---


class LightSettings(ModelSettings):
    """What a light model sees, on which core it is prepared, what it costs."""

    looks: str
    core: int | None = None
    """Of the decode worker."""
    cost: float = 0.0
    """Seconds per image, of the CPU or of a device."""
    is_device: bool = False
    """The model waits, as for a GPU."""


@dataclass(frozen=True)
class OnCore:
    """Another preparer, on one core from its first picture on."""

    preparer: Preparer
    core: int

    def prepare(self, image: Image.Image) -> npt.NDArray[Any]:
        os.sched_setaffinity(0, {self.core})
        return self.preparer.prepare(image)

    @property
    def min_side(self) -> int:
        return self.preparer.min_side


class Light:
    """The mean of a few pixels."""

    batch_size = None
    batch_times: ClassVar[list[float]] = []

    def __init__(self, looks: str, *, core: int | None = None, cost: float = 0.0, is_device: bool = False) -> None:
        self.preparer = PREPARERS[looks] if core is None else OnCore(PREPARERS[looks], core)
        self._cost = cost
        self._spend = time.sleep if is_device else _busy

    def predict(self, batch: Pixels) -> list[Row]:
        self._spend(self._cost * len(batch))
        self.batch_times.append(time.perf_counter())
        return score_rows(batch[:, ::64, ::64].mean(axis=(1, 2, 3)))


class LightPlugin:
    """A plug-in as any other, registered while the bench runs."""

    Settings = LightSettings

    def identify(self, settings: LightSettings) -> Identity:
        return Identity("light", revision="1", preprocessing=settings.looks, schema=SCORES)

    def load(self, settings: LightSettings, *, device: Device) -> Light:
        return Light(settings.looks, core=settings.core, cost=settings.cost, is_device=settings.is_device)


@contextmanager
def _plugin() -> Iterator[None]:
    PLUGINS["bench_light"] = LightPlugin()
    try:
        yield
    finally:
        del PLUGINS["bench_light"]


def _annotate(
    models: Sequence[str],
    paths: Sequence[Path],
    where: Path,
    *,
    min_side: int | None = None,
    core: int | None = None,
    cost: float = 0.0,
    is_device: bool = False,
) -> int:
    """Run our loop in this process, or with a worker on its own core, and return the number of decodes."""
    workspace = Workspace(where)
    _write_records(paths, workspace)
    facts: Mapping[str, Any] = {"kind": "bench_light", "core": core, "cost": cost, "is_device": is_device}
    table = {
        "batch_size": _BATCH_SIZE,
        "workers": 0 if core is None else 1,
        "min_side": min_side,
        "models": {name: {**facts, "looks": name} for name in models},
    }
    source = {"made": {"root": str(paths[0].parent)}}
    config = parse_config({"name": "bench", "sources": source, "annotate": table}, CaptioningConfig, name="bench")
    return annotate(config, workspace).num_decodes


def _write_records(paths: Sequence[Path], workspace: Workspace) -> None:
    rows: list[dict[str, Any]] = [
        {"key": f"{n:016x}", "source": "made", "path": path.name, "num_bytes": path.stat().st_size, "status": "kept"}
        for n, path in enumerate(paths)
    ]
    write_part(workspace.kept / part_name(0), pa.Table.from_pylist(rows, schema=MANIFEST), made_from="bench")
