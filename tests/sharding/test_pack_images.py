"""What pack makes of pixels and masks: caps, re-encoding, formats that pass, masks of files and of alpha."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from sharding.chunk import iterate_samples, open_chunk, read_samples
from sharding.images import BrokenFractionError, probe
from sharding.pack import pack
from sharding.packing.stored_image import stored_size
from sharding.plan import make_plan
from sharding.schema import CAPTIONS, MANIFEST
from sharding.tables import part_name, read_part, write_part
from sharding.verify import verify


@pytest.fixture
def packed(make_config, workspace, tmp_path):
    """Return a function that packs the files below raw/ with some settings and returns {path: Sample}, report."""

    def run(*, masks=None, dry_run=False, filters=None, **settings):
        source = {"root": str(tmp_path / "raw")} | ({"masks": masks} if masks else {})
        config = make_config(
            sources={"photos": source}, pack=settings, filters=filters or {"min_pixels": 1}, max_broken_fraction=0.5
        )
        records, captions = [], []
        for path in sorted((tmp_path / "raw").iterdir()):
            data = path.read_bytes()
            facts, sha256 = probe(data), hashlib.sha256(data).hexdigest()
            records.append(
                dict.fromkeys(MANIFEST.names)
                | {"key": sha256[:16], "sha256": sha256, "source": "photos", "path": path.name, "num_bytes": len(data),
                   "format": facts.format, "width": facts.width, "height": facts.height, "has_alpha": facts.has_alpha,
                   "is_animated": facts.is_animated, "is_pass_through": facts.is_pass_through, "status": "kept"}
            )  # fmt: skip
            captions.append({"key": sha256[:16], "text": "solo", "groups": []})
        write_part(workspace.kept / part_name(0), pa.Table.from_pylist(records, schema=MANIFEST), made_from="1")
        table = pa.Table.from_pylist(captions, schema=CAPTIONS)
        write_part(workspace.captions("default") / part_name(0), table, made_from="1")
        make_plan(config, workspace)
        report = pack(config, workspace, dry_run=dry_run)
        if dry_run:
            return {}, report
        chunk = open_chunk(workspace.chunks / "photos" / "0000")
        assert verify(workspace) == []
        paths = {record["key"]: record["path"] for record in records}
        return {paths[one.key]: one for one in read_samples(chunk.folder, chunk.read_index())}, report

    return run


def size_of(sample) -> tuple[int, int]:
    return Image.open(io.BytesIO(sample.image)).size


def drops(workspace) -> dict[str, str]:
    return {
        row["path"]: row["reason"] for path in workspace.pack_drops.glob("*") for row in read_part(path).to_pylist()
    }


# --- pixels ---


def test_larger_pictures_are_resized_to_the_cap_and_smaller_ones_pass(packed, save, paint):
    large, small = save("large.jpg", paint(1, 200, 100)), save("small.jpg", paint(2, 60, 40))

    samples, _ = packed(max_pixels=5_000)

    assert size_of(samples["large.jpg"]) == stored_size(200, 100, 5_000) == (100, 50)
    assert samples["large.jpg"].facts["original_width"] == 200
    expected = Image.open(large).resize((100, 50), Image.Resampling.LANCZOS)
    difference = np.asarray(expected, int) - np.asarray(Image.open(io.BytesIO(samples["large.jpg"].image)), int)
    assert np.abs(difference).mean() < 2
    assert samples["small.jpg"].image == small.read_bytes()


@pytest.mark.parametrize(
    ("width", "height", "cap"), [(4_000, 3_000, 1_048_576), (70, 5_000, 10_000), (1_280, 600, 768_000)]
)
def test_a_resized_picture_is_never_above_the_cap(width, height, cap):
    new_width, new_height = stored_size(width, height, cap)

    assert new_width * new_height <= cap
    assert new_width >= 1 and new_height >= 1


def test_a_picture_that_falls_below_the_smallest_size_is_dropped(packed, save, paint, workspace):
    save("wide.jpg", paint(1, 331, 7))
    save("square.jpg", paint(2, 30, 30))

    samples, _ = packed(max_pixels=900, filters={"min_pixels": 900, "max_aspect": 100})

    assert set(samples) == {"square.jpg"}
    assert drops(workspace) == {"wide.jpg": "too_small_when_resized"}


def test_a_cap_below_the_smallest_size_is_refused(make_config):
    with pytest.raises(ValueError, match=r"pack\.max_pixels \(100\) is below filters\.min_pixels \(200\)"):
        make_config(pack={"max_pixels": 100}, filters={"min_pixels": 200})


def test_everything_is_encoded_anew_when_asked(packed, save, paint):
    source = save("a.jpg", paint(1), quality=30)

    samples, _ = packed(reencode="always")

    image = Image.open(io.BytesIO(samples["a.jpg"].image))
    assert samples["a.jpg"].image != source.read_bytes()
    assert image.layer[0][1:3] == (1, 1)  # 4:4:4


def test_formats_pass_unchanged_only_when_asked_and_the_report_names_who_cannot_read_them(packed, save, paint):
    source = save("a.webp", paint(1))
    with_alpha = paint(2).convert("RGBA")
    with_alpha.putalpha(40)
    save("b.webp", with_alpha)

    samples, report = packed(pass_through_formats=["webp"])

    assert samples["a.webp"].image == source.read_bytes()
    assert samples["a.webp"].image_name.endswith(".webp")
    assert samples["b.webp"].image_name.endswith(".jpg")
    assert "webp goes in unchanged: not read by Stable Cascade's own loader" in report.summary()


def test_a_dry_run_says_what_the_tars_take_and_what_is_free(packed, save, paint, monkeypatch):
    save("a.jpg", paint(1))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())

    _, report = packed(dry_run=True)

    assert "tars: at most about 0.00 GB, 0.00 GB are free: they do not fit" in report.summary()


# --- masks ---


def write_mask(tmp_path: Path, name: str, mask: Image.Image) -> Path:
    path = tmp_path / "masks" / name
    path.parent.mkdir(exist_ok=True)
    mask.save(path)
    return path


def half(width=96, height=72) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_masks_of_a_folder_go_with_their_pictures(packed, save, paint, tmp_path, workspace):
    for number, name in enumerate(("a.jpg", "b.jpg", "c.webp")):
        save(name, paint(number))
    grey = write_mask(tmp_path, "a.png", half())
    write_mask(tmp_path, "c.png", half().convert("RGB"))

    samples, _ = packed(masks=str(tmp_path / "masks"))

    assert samples["a.jpg"].mask == grey.read_bytes()
    assert samples["b.jpg"].mask == b""
    decoded = Image.open(io.BytesIO(samples["c.webp"].mask))
    assert (decoded.mode, decoded.tobytes()) == ("L", half().tobytes())
    tar = next((workspace.chunks / "photos" / "0000").glob("*.tar"))
    theirs = {one["__key__"]: one for one in wds.WebDataset(str(tar), shardshuffle=False)}
    assert theirs[samples["a.jpg"].key]["mask.png"] == grey.read_bytes()
    assert "mask.png" not in theirs[samples["b.jpg"].key]


def test_a_mask_is_resized_with_its_picture(packed, save, paint, tmp_path):
    save("a.jpg", paint(1, 200, 100))
    write_mask(tmp_path, "a.png", half(200, 100))

    samples, _ = packed(masks=str(tmp_path / "masks"), max_pixels=5_000)

    mask = np.asarray(Image.open(io.BytesIO(samples["a.jpg"].mask)))
    assert mask.shape == (50, 100)
    assert (mask[:, :48] == 255).all() and (mask[:, 52:] == 0).all()


def test_the_original_alpha_becomes_the_mask(packed, save, paint):
    picture = paint(1).convert("RGBA")
    picture.putalpha(half())
    save("a.png", picture)
    save("b.jpg", paint(2))

    samples, _ = packed(masks="alpha")

    assert Image.open(io.BytesIO(samples["a.png"].mask)).tobytes() == half().tobytes()
    assert samples["a.png"].image_name.endswith(".jpg")
    assert samples["b.jpg"].mask == b""


@pytest.mark.parametrize("bad", [half(10, 10), None])
def test_a_bad_mask_drops_its_sample_or_stops(packed, save, paint, tmp_path, workspace, bad):
    save("a.jpg", paint(1))
    save("b.jpg", paint(2))
    path = write_mask(tmp_path, "a.png", bad or half())
    if bad is None:
        path.write_bytes(b"no picture")

    with pytest.raises(BrokenFractionError, match=r"a\.png: bad_mask: the mask .*replace it, or set"):
        packed(masks=str(tmp_path / "masks"), bad_masks="error")
    samples, _ = packed(masks=str(tmp_path / "masks"))

    assert set(samples) == {"b.jpg"}
    assert drops(workspace) == {"a.jpg": "bad_mask"}


def test_a_changed_mask_writes_the_tar_anew_and_an_unchanged_one_does_not(packed, save, paint, tmp_path):
    save("a.jpg", paint(1))
    write_mask(tmp_path, "a.png", half())
    packed(masks=str(tmp_path / "masks"))

    _, unchanged = packed(masks=str(tmp_path / "masks"))
    write_mask(tmp_path, "a.png", Image.new("L", (96, 72), 9))
    samples, changed = packed(masks=str(tmp_path / "masks"))

    assert (unchanged.packed, unchanged.num_current) == ((), 1)
    assert changed.packed == ("photos/0000",)
    assert Image.open(io.BytesIO(samples["a.jpg"].mask)).getpixel((0, 0)) == 9


def test_a_folder_of_masks_that_is_not_there_is_named(packed, save, paint, tmp_path):
    save("a.jpg", paint(1))

    with pytest.raises(FileNotFoundError, match=r"sources\.photos\.masks: .* is no folder"):
        packed(masks=str(tmp_path / "nowhere"))


def test_samples_without_masks_are_read_as_before(packed, save, paint, workspace):
    save("a.jpg", paint(1))
    samples, _ = packed()

    [(key, image, facts, caption)] = iterate_samples(open_chunk(workspace.chunks / "photos" / "0000"))

    one = samples["a.jpg"]
    assert (key, image, facts, caption) == (one.key, one.image, one.facts, one.caption)
