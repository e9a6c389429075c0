"""A run's folder as after months: ledger, metrics, previews, without any training. For the dashboard's bench and tests.

The numbers are made up, their form and amount are real: rows of a kilobyte, a chained ledger, a launch per chunk.
"""

import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sharding.files import digest_of
from training.config import Prompt
from training.preview import write_pictures
from training.run_dir import RunDir

DATASETS = {
    "newest": 176, "recent": 132, "mid": 118, "early": 96, "oldest": 58, "pixiv": 74, "visual novel cg": 33,
    "anime wallpaper": 21,
}  # fmt: skip
"""Chunks of each; 708 in all."""
_RUN_TOML = """
name = "simulated"
device = "cpu"
[data]
workspace = "workspace"
chunks = [{chunks}]
[batch]
batch_size = 128
micro_batch_size = 16
[stage_c]
network = "none.safetensors"
text_encoder = "none"
effnet = "none.safetensors"
[save]
every_steps = 25
"""
_SKIES = (((26, 42, 108), (250, 190, 140)), ((30, 100, 90), (190, 220, 250)), ((120, 50, 30), (250, 210, 90)))
"""Colours of a sky above and below."""
_START = 1_767_225_600  # 2026-01-01
_SECONDS_PER_IMAGE = 0.0265


@dataclass(frozen=True)
class Simulation:
    """How large: num_done chunks of num_chunks are trained, and half of the next one."""

    num_chunks: int = 708
    num_done: int = 431
    steps_per_chunk: int = 63
    images_per_chunk: int = 8000
    preview_every: int = 12
    """Chunks."""
    picture_side: int = 256
    prompts: tuple[str, ...] = (
        "1girl, solo, long hair, looking at viewer, night sky, very aesthetic, newest",
        "scenery, no humans, mountain, lake, cloud, reflection, best quality",
        "1boy, armor, castle, sunset, official art",
    )


class _Ledger:
    """Writes a chained ledger without a sync per line."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.previous = "0" * 64
        self.seconds = float(_START)

    def append(self, event: str, **fields: Any) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.seconds))
        body = {
            "number": len(self.rows), "time": when, "event": event, "fields": fields, "previous": self.previous
        }  # fmt: skip
        self.previous = digest_of(body)
        self.rows.append(json.dumps({**body, "hash": self.previous}, ensure_ascii=False) + "\n")


def simulate_run(root: Path, simulation: Simulation) -> RunDir:
    """Make the folder and return its names."""
    run_dir, names = RunDir(root), chunk_names(simulation.num_chunks)
    root.mkdir(parents=True)
    folders = dict.fromkeys(name.split("/")[0] for name in names)
    run_dir.config_path.write_text(_RUN_TOML.format(chunks=", ".join(f'"{folder}/*"' for folder in folders)))
    run_dir.update_run_json(chunks=names)
    ledger, draw = _Ledger(), random.Random(8)
    with run_dir.metrics_path.open("w", encoding="utf-8") as metrics:
        for number, name in enumerate(names[: simulation.num_done + 1]):
            is_done = number < simulation.num_done
            if not is_done:
                _lose_chunks(ledger, names[number : number + 3], number, simulation, draw)
            num_steps = simulation.steps_per_chunk if is_done else simulation.steps_per_chunk // 2
            _ledger_of(ledger, name, number, simulation, draw, is_done=is_done, num_steps=num_steps)
            metrics.writelines(_rows(name, number, simulation, draw, num_steps=num_steps))
            if is_done and number % simulation.preview_every == 0:
                _previews(run_dir, name, number, simulation)
    run_dir.ledger_path.write_text("".join(ledger.rows), encoding="utf-8")
    run_dir.write_last_exit(75, chunk=names[simulation.num_done])
    return run_dir


def chunk_names(count: int) -> list[str]:
    """Return that many names, the data sets in proportion."""
    total, names = sum(DATASETS.values()), []
    for folder, size in DATASETS.items():
        names += [f"{folder}/{number:04d}" for number in range(max(round(size * count / total), 1))]
    return names[:count]


def _lose_chunks(ledger: _Ledger, names: list[str], number: int, simulation: Simulation, draw: random.Random) -> None:
    """Train chunks, go back behind them, and fail once at the first step of the way."""
    steps = simulation.steps_per_chunk
    for offset, name in enumerate(names):
        _ledger_of(ledger, name, number + offset, simulation, draw, is_done=True, num_steps=steps)
    ledger.append("superseded", chunks=names, reason="rewound: captions were wrong")
    ledger.append("failed", chunk=names[0], global_step=number * steps, reason="DiskFullError: 0 bytes are free")


def _ledger_of(
    ledger: _Ledger, name: str, number: int, simulation: Simulation, draw: random.Random, *, is_done: bool,
    num_steps: int,
) -> None:  # fmt: skip
    first, per_step = number * simulation.steps_per_chunk, simulation.images_per_chunk / simulation.steps_per_chunk
    digest = digest_of({"chunk": name})
    common = {"chunk": name, "position_in_run": number, "chunk_digest": digest, "plan_digest": digest}
    ledger.append(
        "started", **common, parent=None, plan_digests=[digest], epochs=1, steps=simulation.steps_per_chunk,
        images_planned=simulation.images_per_chunk, images_left_out=[], global_step=first,
        resumed_from=None if number == 0 else "chunks/…/final", devices="8 x NVIDIA H100",
    )  # fmt: skip

    def saved(event: str, step: int, folder: str) -> None:
        images = round(step * per_step)
        ledger.append(
            event, chunk=name, path=f"chunks/{name}/{folder}", manifest_digest=digest_of({"state": [name, folder]}),
            epoch=0, step=step, global_step=first + step, images_trained=images, applied_updates=step,
            busy_seconds=round(images * _SECONDS_PER_IMAGE, 3),
        )  # fmt: skip

    for step in range(25, num_steps, 25):
        ledger.seconds += 25 * per_step * _SECONDS_PER_IMAGE
        saved("state_saved", step, f"state-{first + step:08d}")
    if draw.random() < 0.03:
        ledger.append("skipped", chunk=name, epoch=0, step=3, global_step=first + 4, keys=["9f2c"], reason="not_finite")
    if draw.random() < 0.02 and num_steps > 50:
        state = {"global_step": first + 25, "path": f"chunks/{name}/state-{first + 25:08d}"}
        ledger.append(
            "rolled_back", chunk=name, from_global_step=first + 40, **state, pass_over=[], reason="loss_spike"
        )
    ledger.seconds += 60 + per_step * 13 * _SECONDS_PER_IMAGE
    if is_done:
        saved("chunk_done", simulation.steps_per_chunk, "final")


def _rows(name: str, number: int, simulation: Simulation, draw: random.Random, *, num_steps: int) -> list[str]:
    per_step, total = simulation.images_per_chunk / simulation.steps_per_chunk, simulation.num_chunks
    lines = []
    for step in range(1, num_steps + 1):
        global_step = number * simulation.steps_per_chunk + step
        age = global_step / (total * simulation.steps_per_chunk)
        loss = 0.09 + 0.09 * math.exp(-8 * age) + draw.gauss(0, 0.006)
        lines.append(_line(_row(name, global_step, step, age, loss, round(global_step * per_step), draw)))
    lines.append(
        _line({"global_step": number * simulation.steps_per_chunk + num_steps, "chunk": name}
              | {"validation/loss": 0.101 + 0.08 * math.exp(-7 * age) + draw.gauss(0, 0.0008)}
              | {"validation/num_images": 256, "speed/validation_seconds": 41.2})
    )  # fmt: skip
    return lines


def _row(
    name: str, global_step: int, step: int, age: float, loss: float, images: int, draw: random.Random
) -> dict[str, Any]:
    seconds = 3.39 * (1 + abs(draw.gauss(0, 0.03)))
    wait = min(abs(draw.gauss(0.01, 0.008)) + (0.3 if draw.random() < 0.002 else 0), 1.0)
    return {
        "global_step": global_step, "chunk": name, "epoch": 0, "step": step - 1,
        "train/grad_norm": 0.2 + abs(draw.gauss(0.05, 0.05)) + (2 if draw.random() < 0.0004 else 0),
        "train/images_seen": images, "speed/images_per_second": 128 / seconds, "speed/step_seconds": seconds,
        "data/wait_seconds": wait * seconds, "data/wait_fraction": wait,
        "lr/network": 1e-5 * min(global_step / 500, 1) * (0.55 + 0.45 * math.cos(3 * age)),
        "lr/text_encoder": 4e-6 * min(global_step / 500, 1) * (0.55 + 0.45 * math.cos(3 * age)),
        "train/loss": loss, "train/weighted_loss": loss * 1.04,
        f"loss_by_dataset/{name.split('/')[0]}": loss,
        **{f"loss_by_bucket/{832 + 64 * n}x{1216 - 64 * n}": loss + 0.001 * n for n in range(5)},
        **{f"loss_by_timestep/{n / 10}-{(n + 1) / 10}": loss * (1.4 - n / 10) for n in range(10)},
        "sample_mean/timestep": draw.random(), "data/broken": 0, "train/skipped": 0,
        "memory/rss_bytes": 38_654_705_664, "memory/cuda_peak_bytes": 70_866_960_384,
        "progress/campaign_fraction": age, "progress/campaign_left_hours": 42_000 * (1 - age) / 1000,
        "train/spike": 0, "train/loss_average": loss,
    }  # fmt: skip


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _previews(run_dir: RunDir, name: str, number: int, simulation: Simulation) -> None:
    """Draw a picture of its own for each prompt that gets clearer with the run's age."""
    age, side = number / simulation.num_chunks, simulation.picture_side
    coarse = max(round(side / 6 * (1 - age) ** 2), 3)
    pictures, prompts = [], []
    for which, text in enumerate(simulation.prompts):
        small = _landscape(which, side).resize((max(side // coarse, 4),) * 2, Image.Resampling.BOX)
        pictures.append(small.resize((side, side), Image.Resampling.BICUBIC))
        prompts.append(Prompt(text=text, width=side, height=side, steps=20, seed=7 + which))
    folder = run_dir.previews_folder(name)
    folder.mkdir(parents=True)
    write_pictures(folder, (number + 1) * simulation.steps_per_chunk, pictures, prompts)


def _landscape(which: int, side: int) -> Image.Image:
    """Return a sky with a sun and four ridges before it."""
    top, bottom = _SKIES[which % len(_SKIES)]
    mask = Image.linear_gradient("L").resize((side, side))
    picture = Image.composite(Image.new("RGB", mask.size, bottom), Image.new("RGB", mask.size, top), mask)
    pen = ImageDraw.Draw(picture)
    pen.ellipse([side * 0.6, side * 0.12, side * 0.8, side * 0.32], fill=(255, 240, 200))
    for ridge in range(4):
        waves = (math.sin((x + which * 50) / side * (7 + 3 * ridge) + ridge) for x in range(side))
        heights = [side * (0.45 + 0.13 * ridge + 0.06 * wave) for wave in waves]
        shade = tuple(round(value * (0.8 - 0.17 * ridge)) for value in bottom)
        pen.polygon([(0, side), *enumerate(heights), (side, side)], fill=shade)
    return picture
