"""start: from the start of a run, or of its continuation, to the first batch, at any position of a chunk of 8,000.

Each position has a process of its own, as a launch has: it reads the index, makes the plan, starts the loader's
workers, and only then loads the models (tiny ones: the worst case, since workers start while models load). What counts
is how long the first batch is waited for once they are loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from scripts.bench.result import Bar, Result
from scripts.demo_models.stage_c import make_stage_c_models
from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.images import encode_jpeg

_ROOT = Path(__file__).parents[2]
_NUM_SAMPLES, _FULL_SAMPLES = 1_000, 8_000
_SAMPLES_PER_SHARD = 1_000
_SIZES = [(1024, 1024), (1216, 832), (832, 1216), (1152, 896), (1344, 768)]
_POSITIONS = ("beginning", "middle", "end")
_PROGRAM = """
import json, sys, time
started = time.monotonic()
from pathlib import Path
from sharding.chunk import open_chunk
from training.config import RunConfig
from training.plans import batch_plan, caption_settings, pixel_settings

def main():
    chunk = open_chunk(Path(sys.argv[1]))
    config = RunConfig.model_validate(json.loads(sys.argv[2]))
    plan = batch_plan(chunk.read_index(), chunk.name, config=config, epoch=0)
    from training.chunk_data import ChunkData, ChunkSource, make_loader
    step = {"beginning": 0, "middle": len(plan.steps) // 2, "end": len(plan.steps) - 1}[sys.argv[3]]
    data = ChunkData(ChunkSource.of_chunk(chunk), plan, rank=0, world_size=1, first_step=step,
                     captions=caption_settings(config), pixels=pixel_settings(config))
    loader = make_loader(data, workers=config.data.workers, prefetch=config.data.prefetch)
    planned = time.monotonic()
    import torch
    from training.recipes.stage_c import StageC
    StageC(config).load(torch.device("cpu"))
    loaded = time.monotonic()
    assert next(loader).step == step
    first = time.monotonic()
    loader.close()
    print(json.dumps({"planned": planned - started, "models": loaded - planned, "first": first - loaded}))

if __name__ == "__main__":
    main()
"""


def run(*, full: bool, data: Path | None) -> Result:
    """Measure three positions. `data` is not used: the pictures are drawn. full: 8,000 samples instead of 1,000."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chunk = _make_chunk(folder, _FULL_SAMPLES if full else _NUM_SAMPLES)
        config = _config(make_stage_c_models(folder / "models", seed=0))
        program = folder / "start.py"
        program.write_text(_PROGRAM)
        figures: dict[str, float] = {"samples": float(_FULL_SAMPLES if full else _NUM_SAMPLES)}
        for position in _POSITIONS:
            command = [sys.executable, str(program), str(chunk), json.dumps(config), position]
            environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
            answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT, env=environment)
            values = json.loads(answer.stdout.splitlines()[-1])
            figures[f"first_batch_{position}_seconds"] = values["first"]
            figures[f"index_and_plan_{position}_seconds"] = values["planned"]
            figures[f"models_{position}_seconds"] = values["models"]
    return Result(
        bench="start",
        figures=figures,
        bars=[Bar(f"first_batch_{position}_seconds", at_most=2) for position in _POSITIONS],
        full_size=full,
        peer="none",
        notes=[
            "first_batch: waited for once the models are loaded; 2 workers; a micro-batch of 4",
            "index_and_plan: with Python's imports; models: with those of torch and transformers",
        ],
    )


def _config(models: dict[str, Path]) -> dict[str, object]:
    names = {"network": "stage_c", "text_encoder": "text_encoder", "tokenizer": "tokenizer", "effnet": "effnet"}
    return {
        "name": "start",
        "data": {"workspace": "none", "workers": 2},
        "batch": {"batch_size": 16, "micro_batch_size": 4},
        "optimizer": {"learning_rate": 1e-5},
        "stage_c": {key: str(models[name]) for key, name in names.items()},
    }


def _make_chunk(folder: Path, num_samples: int) -> Path:
    pictures = []
    for number, size in enumerate(_SIZES):
        gradient = Image.linear_gradient("L").rotate(number * 30).resize(size)
        picture = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
        pictures.append((encode_jpeg(picture, quality=85), size))
    where = folder / "chunks" / "bench" / "0000"
    shards, rows = [], []
    for first in range(0, num_samples, _SAMPLES_PER_SHARD):
        numbers = range(first, first + _SAMPLES_PER_SHARD)
        samples = [_sample(number, *pictures[number % len(pictures)]) for number in numbers]
        shard, shard_rows = write_shard(where, first // _SAMPLES_PER_SHARD, samples)
        shards.append(shard)
        rows += shard_rows
    commit_chunk(where, rows, name="bench/0000", shards=shards, policy="p", shard_policy="p", made_from="bench", seed=0)
    return where


def _sample(number: int, data: bytes, size: tuple[int, int]) -> Sample:
    tags, key = [f"tag {number % 97}", "solo", "sky"] * 8, f"{number:016x}"
    row = {
        "width": size[0], "height": size[1], "groups": [{"group": "general", "tags": tags}], "period": "",
        "dataset": "bench", "repeats": 1, "loss_weight": 1.0,
    }  # fmt: skip
    return Sample(key, f"{key}.jpg", data, {"width": size[0]}, ", ".join(tags), row)
