"""A workspace of two chunks of made-up pictures, and a run.toml for it."""

import io
from pathlib import Path

import pytest
from PIL import Image

from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.schema import Workspace

RUN_TOML = """
name = "tiny"
device = "cpu"
[data]
workspace = "{workspace}"
chunks = ["made/*"]
[batch]
batch_size = 4
micro_batch_size = 2
[buckets]
resolution = [256, 256]
[schedule]
name = "constant"
[stage_c]
network = "{workspace}/none.safetensors"
text_encoder = "{workspace}/none"
effnet = "{workspace}/none.safetensors"
"""


def make_chunk(workspace: Path, number: int, num_samples: int = 4) -> None:
    folder = Workspace(workspace).chunks / "made" / f"{number:04d}"
    samples = []
    for sample_number in range(num_samples):
        stream = io.BytesIO()
        Image.new("RGB", (128, 128), (40 * sample_number, 80, number)).save(stream, "JPEG")
        key = f"{100 * number + sample_number:016x}"
        row = {
            "width": 128, "height": 128, "groups": None, "period": "mid", "repeats": 1, "loss_weight": 1.0,
            "dataset": "cats" if sample_number else "dogs",
        }  # fmt: skip
        samples.append(Sample(key, f"{key}.jpg", stream.getvalue(), {"key": key}, "a picture", row))
    shard, rows = write_shard(folder, 0, samples)
    facts = {"policy": "p", "shard_policy": "p", "made_from": "test", "seed": 0}
    commit_chunk(folder, rows, name=f"made/{number:04d}", shards=[shard], **facts)


@pytest.fixture
def run_toml(tmp_path) -> Path:
    """A valid run.toml whose workspace has chunks made/0000 and made/0001, and whose weights do not exist."""
    for number in range(2):
        make_chunk(tmp_path / "workspace", number)
    path = tmp_path / "run.toml"
    path.write_text(RUN_TOML.format(workspace=tmp_path / "workspace"))
    return path


@pytest.fixture
def own_accelerator():
    """For a launch in this process: accelerate refuses another precision than that of tests before."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
