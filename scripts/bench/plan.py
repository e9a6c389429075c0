"""Plan many synthetic rows, with relatives, a held-out chunk and weights, through `make_plan`: time and memory.

A process of its own plans, so that its peak memory is the plan's alone. Reading kept parts and writing the plan is
part of the time.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from scripts.bench.result import Bar, Result
from sharding.schema import MANIFEST, RELATIVES, Workspace
from sharding.tables import part_name, write_part

_ROWS, _FULL_ROWS = 500_000, 6_000_000
_ROWS_PER_PART = 8_000
_SHARES = {
    "newest": 0.328, "recent": 0.245, "mid": 0.177, "early": 0.101, "oldest": 0.028, "pixiv": 0.061,
    "visual novel cg": 0.041, "anime wallpaper": 0.019,
}  # fmt: skip
"""Data sets of a real set of 5.6 M pictures."""
_RELATED_FRACTION = 0.3
_PROGRAM = """
import json, sys, time
from pathlib import Path
from scripts.bench.result import peak_gigabytes
from sharding.config import DatasetConfig
from sharding.plan import make_plan
from sharding.schema import Workspace
config = DatasetConfig.model_validate(json.loads(sys.argv[2]))
started = time.monotonic(), time.process_time()
report = make_plan(config, Workspace(Path(sys.argv[1])))
print(json.dumps({"seconds": time.monotonic() - started[0], "cpu_seconds": time.process_time() - started[1],
                  "peak": peak_gigabytes(), "images": report.num_images, "chunks": report.num_chunks}))
"""


def run(*, full: bool, data: Path | None) -> Result:
    """Plan twice: afresh, and again with a twentieth of new pictures. `data` is not used: rows are synthetic."""
    num_rows = _FULL_ROWS if full else _ROWS
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        _write_kept(workspace, num_rows, first_part=0)
        fresh = _plan(workspace)
        num_new = num_rows // 20
        _write_kept(workspace, num_new, first_part=-(-num_rows // _ROWS_PER_PART))
        again = _plan(workspace)
    return Result(
        bench="plan",
        figures={
            "rows": num_rows,
            "plan_seconds": fresh["seconds"],
            "plan_cpu_seconds": fresh["cpu_seconds"],
            "peak_gigabytes": max(fresh["peak"], again["peak"]),
            "replan_with_new_seconds": again["seconds"],
            "chunks": fresh["chunks"],
        },
        bars=[Bar("plan_seconds", at_most=120), Bar("peak_gigabytes", at_most=2)],
        full_size=full,
        peer="none",
        notes=[
            f"{_RELATED_FRACTION:.0%} of the pictures have relatives; 1,000 held out per data set; weights by tag",
            f"planned again with {num_new:,} new pictures; the memory is the larger of both",
        ],
    )


def _plan(workspace: Workspace) -> dict[str, float]:
    config = {
        "name": "bench",
        "sources": {name: {"root": "raw"} for name in _SHARES},
        "plan": {
            "held_out": 1_000,
            "weights": [{"tags": ["rare"], "repeats": 2}, {"source": "oldest", "loss_weight": 0.5}],
        },
    }
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(workspace.root), json.dumps(config)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    values: dict[str, float] = json.loads(answer.stdout)
    return values


def _write_kept(workspace: Workspace, num_rows: int, *, first_part: int) -> None:
    """Write kept parts and, beside them, a table that puts three tenths of their keys into pairs."""
    random = np.random.default_rng(first_part)
    components, related = [], []
    for part, start in enumerate(range(0, num_rows, _ROWS_PER_PART), first_part):
        count = min(_ROWS_PER_PART, num_rows - start)
        keys = [f"{number:016x}" for number in random.integers(0, 2**63, count).tolist()]
        columns = {name: pa.nulls(count, MANIFEST.field(name).type) for name in MANIFEST.names}
        columns["key"] = pa.array(keys)
        columns["source"] = pa.array(random.choice(list(_SHARES), count, p=list(_SHARES.values())))
        columns["path"] = pa.array([f"{key}.jpg" for key in keys])
        columns["tags_general"] = pa.array([["solo", "sky", "rare"] if n % 50 == 0 else ["solo"] for n in range(count)])
        write_part(workspace.kept / part_name(part), pa.table(columns, schema=MANIFEST), made_from=f"{num_rows}")
        chosen = keys[: int(count * _RELATED_FRACTION)]
        related += chosen
        components += [part * _ROWS_PER_PART + number // 2 for number in range(len(chosen))]
    table = pa.table([pa.array(components, pa.int64()), pa.array(related)], schema=RELATIVES)
    write_part(workspace.dedupe / "relatives" / part_name(first_part), table, made_from="bench")
