"""A packed chunk in the eyes of webdataset's own reader."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds

from sharding.chunk import iterate_samples, open_chunk
from sharding.images import decode_rgb, probe
from sharding.pack import pack
from sharding.plan import make_plan
from sharding.schema import CAPTIONS, MANIFEST
from sharding.tables import part_name, write_part


def write_inputs(config, workspace, names):
    records, captions = [], []
    for number, name in enumerate(names):
        data = (config.sources["photos"].root / name).read_bytes()
        facts, sha256 = probe(data), hashlib.sha256(data).hexdigest()
        records.append(
            dict.fromkeys(MANIFEST.names)
            | {
                "key": sha256[:16], "sha256": sha256, "source": "photos", "path": name, "num_bytes": len(data),
                "format": facts.format, "width": facts.width, "height": facts.height,
                "is_pass_through": facts.is_pass_through, "rating": "general", "status": "kept",
            }
        )  # fmt: skip
        captions.append({"key": sha256[:16], "text": f"猫 {number}, solo", "groups": []})
    write_part(workspace.kept / part_name(0), pa.Table.from_pylist(records, schema=MANIFEST), made_from="1")
    write_part(
        workspace.captions("default") / part_name(0), pa.Table.from_pylist(captions, schema=CAPTIONS), made_from="1"
    )


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_same_keys_captions_and_pixels(make_config, workspace, save, paint):
    names = ["a.jpg", "b.png", "c.webp", "d.jpg", "e.bmp"]
    for number, name in enumerate(names):
        save(name, paint(number))
    save("d.jpg", paint(3).rotate(90, expand=True), exif=_rotated())
    config = make_config(pack={"shard_size": 2})
    write_inputs(config, workspace, names)
    make_plan(config, workspace)
    pack(config, workspace)
    chunk = open_chunk(workspace.chunks / "photos" / "0000")

    tars = [str(chunk.shard_path(shard.path)) for shard in chunk.info.shards]
    theirs = list(wds.WebDataset(tars, shardshuffle=False).decode("pil"))

    ours = list(iterate_samples(chunk))
    assert len(theirs) == len(ours) == 5
    for sample, (key, image, facts, text) in zip(theirs, ours, strict=True):
        assert sample["__key__"] == key
        assert sample["txt"] == text
        assert sample["json"] == facts
        picture = sample["jpg"] if "jpg" in sample else sample["png"]
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(decode_rgb(image)))


def _rotated():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
