"""Compose captions of many synthetic pictures after a threshold change: time, CPU time, memory, and no torch.

A process of its own composes, so that its memory is its own. Kept parts and the annotations of a tagger, two scorers
and a date are written first, with some 30 tags a picture of a long-tailed vocabulary; that is not measured. The
policy is the seed's; a second run has every rule switched on.
"""

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from captioning.taggers.base import Label, label_table
from scripts.bench.result import Bar, Result
from sharding.schema import MANIFEST, SCORES, TAGGER, Workspace
from sharding.tables import part_name, write_part

_ROWS, _FULL_ROWS = 80_000, 6_000_000
_ROWS_PER_PART = 8_000
_NUM_LABELS, _NUM_CHARACTERS = 8_000, 2_500
_TAGS_OF_RECORD, _TAGS_OF_TAGGER = 22, 40
_NUM_DISTINCT_PARTS = 10
"""Further parts are links to these, so that making them is not the bench."""
_FOLDERS = ("dedupe/kept", "annotations/wd", "annotations/aesthetic", "annotations/quality", "annotations/date")
_PROCESSES = 2
_HEADS = ("skirt", "hair", "eyes", "shirt", "dress", "ribbon", "sky", "gloves", "hat", "background")
_PROGRAM = """
import json, sys, time
from pathlib import Path
from captioning.compose import compose
from captioning.config import CaptioningConfig
from scripts.bench.result import peak_gigabytes
from sharding.schema import Workspace
workspace, config, policy, index, number = sys.argv[1:]
config = CaptioningConfig.model_validate(json.loads(config))
started = time.monotonic(), time.process_time()
report = compose(config, Workspace(Path(workspace)), policy=policy, part_index=int(index), num_parts=int(number))
heavy = [name for name in ("torch", "transformers", "onnxruntime") if name in sys.modules]
print(json.dumps({"seconds": time.monotonic() - started[0], "cpu_seconds": time.process_time() - started[1],
                  "peak": peak_gigabytes(), "captions": report.num_captions, "heavy": len(heavy)}))
"""


def run(*, full: bool, data: Path | None) -> Result:
    """Compose by two policies. `data` is not used: rows are synthetic."""
    num_rows = _FULL_ROWS if full else _ROWS
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        _write(workspace, num_rows)
        seed = _compose(workspace, "seed")
        rules = _compose(workspace, "all_rules")
    return Result(
        bench="compose",
        figures={
            "rows": num_rows,
            "seconds": seed["seconds"],
            "rows_per_cpu_second": num_rows / seed["cpu_seconds"],
            "all_rules_seconds": rules["seconds"],
            "all_rules_rows_per_cpu_second": num_rows / rules["cpu_seconds"],
            "peak_gigabytes": max(seed["peak"], rules["peak"]),
            "heavy_modules_imported": seed["heavy"] + rules["heavy"],
        },
        bars=[
            Bar("seconds", at_most=300),
            Bar("all_rules_seconds", at_most=300),
            Bar("peak_gigabytes", at_most=2),
            Bar("heavy_modules_imported", at_most=0),
        ],
        full_size=full,
        peer="none",
        notes=[
            f"{_PROCESSES} processes; memory is the sum of both",
            "all rules: aliases, redundant tags, count, series, blacklists, traits, MCut, 225 tokens",
        ],
    )


def _compose(workspace: Workspace, policy: str) -> dict[str, float]:
    config = json.dumps(_config())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(workspace.root), config, policy, str(index), str(_PROCESSES)],
            stdout=subprocess.PIPE, text=True,
        )
        for index in range(_PROCESSES)
    ]  # fmt: skip
    answers = []
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"compose ended with {process.returncode}")
        answers.append(json.loads(output))
    return {
        "seconds": max(it["seconds"] for it in answers),
        **{name: sum(it[name] for it in answers) for name in ("cpu_seconds", "peak", "captions", "heavy")},
    }


def _config() -> dict[str, Any]:
    steps = [[0.9 - place / 10, f"tier {place}"] for place in range(8)]
    tiers = {
        name: {"model": name, "comparison": ">", "steps": steps, "rest": "last"} for name in ("aesthetic", "quality")
    }
    tags: dict[str, Any] = {"tagger": "wd", "record_categories": ["general", "character", "copyright", "artist"]}
    date = {"model": "date"}
    groups = ["aesthetic", "quality", "date", "custom", "rating", "character", "series", "rest"]
    seed = {"groups": groups, "tiers": tiers, "date": date, "tags": tags, "custom": {"boards": "{period}"}}
    traits = {_label(place, "character"): [_label(place % 50, "general")] for place in range(1_000)}
    all_rules = seed | {
        "groups": ["first", *groups[:5], "count", *groups[5:-1], "artist", "clothing", "rest"],
        "tag_groups": {"clothing": ["*_skirt", "*_dress"]},
        "templates": {"artist": "art by {tag}", "series": "from {tag}"},
        "first_words": ["solo"],
        "traits": traits,
        "tokens": {"max_tokens": 225},
        "tags": tags
        | {
            "mcut": ["character"],
            "character_tag_expand": False,
            "drop_redundant": True,
            "drop_series_of_characters": True,
            "alias": {_label(place, "general"): "solo" for place in range(100, 110)},
            "blacklist": {"general": {"tags": ["absurdres"], "substrings": ["artifact"], "patterns": ["bad_.*"]}},
        },
    }
    return {
        "name": "bench",
        "sources": {"boards": {"root": "raw", "dataset": "{period}"}},
        "periods": {"newest": [2022, 2024], "recent": [2019, 2021], "oldest": [2005, 2018]},
        "annotate": {
            "models": {
                "wd": {"kind": "wd_tagger", "model": "none"},
                "date": {"kind": "date"},
                **{name: {"kind": "aesthetic_shadow", "model": "none"} for name in tiers},
            }
        },
        "policies": {"seed": seed, "all_rules": all_rules},
        "pack": {"policy": "seed"},
    }


def _label(place: int, category: str) -> str:
    if category == "character":
        return f"name{place}_of_someone_(series_{place % 300})"
    head = _HEADS[place % len(_HEADS)]
    return head if place < len(_HEADS) else f"kind{place // len(_HEADS)}_{head}"


def _write(workspace: Workspace, num_rows: int) -> None:
    labels = [
        Label(_label(place, category), category)
        for category, number in (("general", _NUM_LABELS), ("character", _NUM_CHARACTERS))
        for place in range(number)
    ]
    metadata = {"model_digest": "bench"}
    write_part(
        workspace.annotations("wd") / "labels.parquet", label_table(labels), made_from="bench", metadata=metadata
    )
    for number in range(-(-num_rows // _ROWS_PER_PART)):
        if number < _NUM_DISTINCT_PARTS:
            for folder, table in _tables(number).items():
                path = workspace.root / folder / part_name(number)
                write_part(path, table, made_from=f"bench-{number}", metadata=metadata)
        else:
            for folder in _FOLDERS:
                made = workspace.root / folder / part_name(number % _NUM_DISTINCT_PARTS)
                os.link(made, workspace.root / folder / part_name(number))


def _tables(number: int) -> dict[str, pa.Table]:
    """Return the tables of one part by their folder in the workspace."""
    random, count = np.random.default_rng(number), _ROWS_PER_PART
    keys = pa.array([f"{it:016x}" for it in random.integers(0, 2**63, count).tolist()])
    columns = {name: pa.nulls(count, MANIFEST.field(name).type) for name in MANIFEST.names}
    columns |= {"key": keys, "source": pa.array(["boards"] * count), "format": pa.array(["jpeg"] * count)}
    columns["created_at"] = pa.array([datetime(2005 + it % 20, 1, 1, tzinfo=UTC) for it in range(count)])
    columns["created_at"] = columns["created_at"].cast(MANIFEST.field("created_at").type)
    columns["tags_general"] = _lists(random, _TAGS_OF_RECORD, [_label(it, "general") for it in range(_NUM_LABELS)])
    columns["tags_character"] = _lists(random, 1, [_label(it, "character") for it in range(_NUM_CHARACTERS)])
    columns["tags_copyright"] = _lists(random, 1, [f"series_{it}" for it in range(300)])
    columns["tags_artist"] = _lists(random, 1, [f"artist_{number}_{it}" for it in range(5_000)])
    scores = {
        f"annotations/{name}": pa.table([keys, values.astype(np.float32), pa.array(["ok"] * count)], schema=SCORES)
        for name, values in (
            ("aesthetic", random.random(count)),
            ("quality", random.random(count)),
            ("date", random.integers(2005, 2025, count)),
        )
    }
    return {
        "dedupe/kept": pa.table(columns, schema=MANIFEST),
        "annotations/wd": _tagger_table(random, keys),
        **scores,
    }


def _ranks(random: np.random.Generator, shape: tuple[int, int], number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return long-tailed choices, as those of tags are."""
    return np.minimum(number * random.random(shape) ** 3, number - 1).astype(np.int64)


def _lists(random: np.random.Generator, per_row: int, values: list[str]) -> pa.Array:
    chosen = _ranks(random, (_ROWS_PER_PART, per_row), len(values)).reshape(-1)
    offsets = pa.array(np.arange(_ROWS_PER_PART + 1) * per_row, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values).take(pa.array(chosen)))


def _tagger_table(random: np.random.Generator, keys: pa.Array) -> pa.Table:
    count = len(keys)
    ids = np.sort(_ranks(random, (count, _TAGS_OF_TAGGER), _NUM_LABELS + _NUM_CHARACTERS), axis=1).reshape(-1)
    probs = (0.05 + 0.95 * random.random(ids.shape) ** 1.5).astype(np.float32)
    offsets = pa.array(np.arange(count + 1) * _TAGS_OF_TAGGER, pa.int32())
    ratings = random.random(count * 4).astype(np.float32)
    columns = [
        keys,
        pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * 4, pa.int32()), pa.array(ratings)),
        pa.ListArray.from_arrays(offsets, pa.array(ids.astype(np.int32))),
        pa.ListArray.from_arrays(offsets, pa.array(probs)),
        pa.array(["ok"] * count),
    ]
    return pa.table(columns, schema=TAGGER)
