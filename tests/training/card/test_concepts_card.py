"""The card of a run on packed concepts: concepts and stages in place of data sets."""

import io

import pyarrow as pa
import pytest
from PIL import Image

from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.schema import Workspace, index_schema
from tests.training.conftest import RUN_TOML
from tests.training.paper_run import PaperRun
from training.card.card import read_facts, render_card
from training.chunk_records import totals

ROWS = [("ada", 1), ("ada", 1), ("ada", 2), ("ada/class", 1), ("ada/class", 1), ("bob", 1), ("bob", 1)]


def make_stage(workspace, name, rows):
    folder, samples = Workspace(workspace).chunks / "concepts" / name, []
    for number, (concept, repeats) in enumerate(rows):
        stream = io.BytesIO()
        Image.new("RGB", (128, 128), (30 * number, 80, 10)).save(stream, "JPEG")
        key = f"{number:016x}"
        row = {
            "width": 128, "height": 128, "groups": None, "period": "", "repeats": repeats, "loss_weight": 1.0,
            "dataset": concept.partition("/")[0], "concept": concept, "every_epochs": 1, "epoch_offset": 0,
        }  # fmt: skip
        samples.append(Sample(key, f"{key}.jpg", stream.getvalue(), {"key": key}, concept, row))
    shard, index_rows = write_shard(folder, 0, samples)
    facts = {"policy": "p", "shard_policy": "p", "made_from": "test", "seed": 0}
    extra = {"concept", "every_epochs", "epoch_offset"}
    table = pa.Table.from_pylist([dict(row) for row in index_rows], schema=index_schema(extra))
    commit_chunk(folder, table, name=f"concepts/{name}", shards=[shard], **facts)


@pytest.fixture
def run(tmp_path):
    """Two stages over the same pictures; the first is trained."""
    make_stage(tmp_path / "workspace", "01-with-text", ROWS)
    make_stage(tmp_path / "workspace", "02-without-text", ROWS)
    toml = tmp_path / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=tmp_path / "workspace"))
    run = PaperRun(toml, tmp_path / "run", "data.chunks=['concepts/*']", "save.model_card.license=openrail++")
    run.train("concepts/01-with-text", run.campaign())
    return run


def test_a_run_on_concepts_has_tables_of_concepts_and_stages(run):
    facts = read_facts(run.config, run.run_dir.root)

    text = render_card(run.config, facts)

    assert (
        """\
| concept | images | class images |
|---|---|---|
| **ada** | 3 | 2 |
| **bob** | 2 | 0 |
| **Total** | 5 | 2 |

Images shown, repeats and epochs counted:

| stage | training done | remaining | total |
|---|---|---|---|
| **01-with-text** | 8 | 0 | 8 |
| **02-without-text** | 0 | 8 | 8 |
| **Total** | 8 | 8 | 16 |
"""
        in text
    )
    assert totals(run.ledger.lines).images_seen == 8
    assert "dataset name" not in text and "## Dataset:" not in text
