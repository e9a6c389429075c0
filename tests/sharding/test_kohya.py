"""Folders for kohya's sd-scripts, out and in again. The two readers here follow the rules of kohya's two branches."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from sharding import cli
from sharding.chunk import Sample, commit_chunk, open_chunk, seal, write_shard
from sharding.config import ConfigError, DatasetConfig, load_config
from sharding.kohya.exporting import export_kohya
from sharding.kohya.importing import import_kohya
from sharding.metadata import folder, kohya
from sharding.metadata.tables import Tables
from sharding.schema import MANIFEST, Workspace
from sharding.tables import part_name, read_parts, write_part

CAPTIONS = ("very aesthetic, 1girl, o_o, saber (fate)", "solo, 猫", "")


def read_as_cascade(image_dir: Path, in_json: Path) -> dict[str, str]:
    """Read as the stable-cascade branch does: an existing path, or a stem looked up in image_dir; captions joined."""
    found = {}
    for key, entry in json.loads(in_json.read_text(encoding="utf-8")).items():
        path = key if Path(key).exists() else next(iter(map(str, image_dir.glob(f"{key}.*"))), None)
        assert path is not None and Path(path).is_file(), key
        assert "train_resolution" not in entry  # would forbid bucket_no_upscale
        caption, tags = entry.get("caption"), entry.get("tags")
        if caption is None:
            caption = tags
        elif tags:
            caption = caption + ", " + tags
        found[Path(path).name] = caption or ""
    return found


def read_as_main(image_dir: Path, in_json: Path, *, wildcard: bool = False) -> dict[str, str]:
    """Read as the main branch does: an absolute path, or one below image_dir, with its ending."""
    found = {}
    for key, entry in json.loads(in_json.read_text(encoding="utf-8")).items():
        path = image_dir / key
        assert path.is_file() and len(entry["image_size"]) == 2
        caption, tags = entry.get("caption") or "", entry.get("tags")
        if wildcard and tags is not None:
            caption = "\n".join(f"{line}, {tags}" for line in caption.split("\n") if line.strip())
        elif tags:
            caption = caption + ", " + tags if caption else tags
        found[path.name] = caption
    return found


@pytest.fixture
def packed(workspace, make_config, save, paint, encode) -> DatasetConfig:
    """A chunk of three pictures; the first two are packed as they are in the source."""
    config = make_config()
    records, samples = [], []
    for number, caption in enumerate(CAPTIONS):
        data, key = encode(paint(number)), f"{number:016x}"
        save(f"{number}.jpg", data if number < 2 else b"other bytes")
        records.append(dict.fromkeys(MANIFEST.names) | {"key": key, "source": "photos", "path": f"{number}.jpg"})
        row = {"width": 96, "height": 72, "groups": [], "dataset": "photos", "period": "", "repeats": 1,
               "loss_weight": 1.0}  # fmt: skip
        samples.append(Sample(key, f"{key}.jpg", data, {"key": key}, caption, row))
    write_part(workspace.manifest / part_name(0), pa.Table.from_pylist(records, schema=MANIFEST), made_from="x")
    commit(workspace, samples)
    return config


def commit(workspace: Workspace, samples: list[Sample], **changes) -> None:
    folder = workspace.chunks / "photos" / "0000"
    shard, rows = write_shard(folder, 0, samples)
    rows = [row | changes.get(row["key"], {}) for row in rows]
    commit_chunk(folder, rows, name="photos/0000", shards=[shard], policy="p", shard_policy="p", made_from="m", seed=0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_both_branches_of_kohya_read_every_picture_and_caption(packed, workspace, tmp_path, monkeypatch):
    report = export_kohya(packed, workspace, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0000").mkdir()  # stable-cascade takes a folder named like a stem for the image
    folder, in_json = tmp_path / "out/photos/0000", tmp_path / "out/photos/0000.json"

    expected = {f"{number:016x}.jpg": caption for number, caption in enumerate(CAPTIONS)}
    assert read_as_cascade(folder, in_json) == read_as_main(folder, in_json) == expected
    assert (report.num_chunks, report.num_current, report.num_images) == (1, 0, 3)
    for name, caption in expected.items():
        assert (folder / name).with_suffix(".txt").read_text(encoding="utf-8") == caption


def test_captions_survive_wildcards_when_asked(packed, workspace, tmp_path):
    export_kohya(packed, workspace, tmp_path / "out", text_key="caption")
    folder, in_json = tmp_path / "out/photos/0000", tmp_path / "out/photos/0000.json"

    assert read_as_main(folder, in_json, wildcard=True) == read_as_cascade(folder, in_json)
    assert sorted(read_as_main(folder, in_json).values()) == sorted(CAPTIONS)


def test_an_export_that_was_cut_short_ends_with_the_same_bytes(packed, workspace, tmp_path):
    export_kohya(packed, workspace, tmp_path / "whole", seen_at=Path("/data/kohya"))
    out = tmp_path / "cut"
    export_kohya(packed, workspace, out, seen_at=Path("/data/kohya"))
    folder = out / "photos/0000"
    (out / "photos/0000.json").unlink()
    (folder / f"{0:016x}.jpg").unlink()
    (folder / f"{1:016x}.jpg").write_bytes(b"half")

    assert export_kohya(packed, workspace, out, seen_at=Path("/data/kohya")).num_current == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert "/data/kohya/photos/0000/0000000000000000.jpg" in (out / "photos/0000.json").read_text()
    assert export_kohya(packed, workspace, out, seen_at=Path("/data/kohya")).num_current == 1


def test_a_changed_chunk_is_exported_again_without_what_left_it(packed, workspace, tmp_path, encode, paint):
    out = tmp_path / "out"
    export_kohya(packed, workspace, out)
    (out / "photos/0000/0000000000000000_sc_latents.npz").write_bytes(b"a cache of kohya's")
    row = {"width": 96, "height": 72, "groups": [], "dataset": "photos", "period": "", "repeats": 1, "loss_weight": 1.0}
    commit(workspace, [Sample("f" * 16, f"{'f' * 16}.jpg", encode(paint(9)), {}, "new", row)])

    assert export_kohya(packed, workspace, out).num_current == 0
    assert read_as_main(out / "photos/0000", out / "photos/0000.json") == {f"{'f' * 16}.jpg": "new"}
    assert sorted(path.name for path in (out / "photos/0000").glob("[!.]*.[jt]*")) == [
        f"{'f' * 16}.jpg",
        f"{'f' * 16}.txt",
    ]
    assert (out / "photos/0000/0000000000000000_sc_latents.npz").exists()


def test_hard_links_are_made_only_to_files_that_hold_the_packed_bytes(packed, workspace, tmp_path):
    copied = export_kohya(packed, workspace, tmp_path / "copied")
    linked = export_kohya(packed, workspace, tmp_path / "linked", link="hardlink")

    assert (copied.num_linked, linked.num_linked) == (0, 2)
    assert (tmp_path / "raw/0.jpg").samefile(tmp_path / f"linked/photos/0000/{0:016x}.jpg")
    pictures = [{name: data for name, data in tree(tmp_path / way).items() if name.endswith("jpg")}
                for way in ("copied", "linked")]  # fmt: skip
    assert pictures[0] == pictures[1]


def test_repeats_masks_and_weights_go_where_kohya_can_use_them(packed, workspace, tmp_path, encode, paint):
    row = {"width": 96, "height": 72, "groups": [], "dataset": "photos", "period": "", "repeats": 1, "loss_weight": 1.0}
    mask = encode(paint(5).convert("L"), "PNG")
    samples = [Sample(f"{n:016x}", f"{n:016x}.jpg", encode(paint(n)), {}, f"c{n}", row, mask if n == 0 else b"")
               for n in range(3)]  # fmt: skip
    commit(workspace, samples, **{f"{1:016x}": {"repeats": 3}, f"{2:016x}": {"loss_weight": 0.5}})
    out = tmp_path / "out"

    report = export_kohya(packed, workspace, out)

    assert (report.num_masks, report.num_weighted) == (1, 1) and "cannot be told" in report.summary()
    assert (out / f"photos/0000.masks/{0:016x}.png").read_bytes() == mask
    folder = out / "photos/0000"
    assert set(read_as_main(folder, out / "photos/0000.repeats-3.json").values()) == {"c1"}
    assert set(read_as_main(folder, out / "photos/0000.repeats-1.json").values()) == {"c0", "c2"}
    assert len(read_as_cascade(folder, out / "photos/0000.json")) == 3
    assert (out / "dataset_config.toml").read_text().count("num_repeats = 3") == 1


def test_a_dry_run_and_a_wrong_chunk_write_nothing(packed, workspace, tmp_path):
    assert export_kohya(packed, workspace, tmp_path / "out", dry_run=True).num_images == 3
    with pytest.raises(ValueError, match=r"'photos/7'.*there are photos/0000"):
        export_kohya(packed, workspace, tmp_path / "out", chunks=["photos/7"])
    with pytest.raises(ValueError, match="inside the workspace"):
        export_kohya(packed, workspace, workspace.chunks / "out")
    with pytest.raises(ValueError, match="no chunk to export"):
        export_kohya(packed, Workspace(tmp_path / "empty"), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_an_exported_chunk_may_be_sealed(packed, workspace, tmp_path):
    seal(open_chunk(workspace.chunks / "photos" / "0000"), "run-1")

    assert export_kohya(packed, workspace, tmp_path / "out", chunks=["photos/0000"]).num_images == 3


# --- and in again ---


def captions_in(config: DatasetConfig) -> dict[str, str]:
    """Return the captions that the imported sources give, in kohya's spelling, by file name."""
    captions = {}
    for source in config.sources.values():
        for path in sorted(source.root.glob("*.jpg")):
            if source.importer == "kohya":
                found = kohya.read_metadata(
                    source.root, path.relative_to(source.root), Tables(metadata=source.metadata)
                )
            else:
                found = folder.read_metadata(source.root, path.relative_to(source.root))
            tags = [tag if tag == "o_o" else tag.replace("_", " ") for tag in found.tags.get("general", ())]
            captions[path.name] = ", ".join([*filter(None, [found.custom.get("caption")]), *tags])
    return captions


@pytest.mark.parametrize("text_key", ["tags", "caption"])
def test_what_was_exported_comes_in_with_the_same_pictures_and_captions(packed, workspace, tmp_path, text_key):
    export_kohya(packed, workspace, tmp_path / "out", text_key=text_key)

    import_kohya(tmp_path / "out/photos/0000", output=tmp_path / "one.toml", metadata=tmp_path / "out/photos/0000.json")
    import_kohya(tmp_path, output=tmp_path / "two.toml", dataset_config=tmp_path / "out/dataset_config.toml")

    expected = {f"{number:016x}.jpg": caption for number, caption in enumerate(CAPTIONS)}
    for output in ("one.toml", "two.toml"):
        config = load_config(tmp_path / output, DatasetConfig)
        assert captions_in(config) == expected
        [source] = config.sources.values()
        assert source.root == tmp_path / "out/photos/0000" and source.importer == "kohya"
        assert (source.metadata.parent == tmp_path) == (text_key == "caption")  # ours, where theirs needs joining


def test_repeat_folders_become_weights_and_class_tokens_captions(save, paint, tmp_path):
    for name in ("10_shinobu 1girl/a.jpg", "10_shinobu 1girl/b.jpg", "1_style/c.jpg", "plain/d.jpg", "0_off/e.jpg"):
        save(f"kohya/{name}", paint(1))
    save("kohya/10_shinobu 1girl/a.txt", "solo, smile\nsecond line")
    save("kohya/1_style/c.txt", "sky")

    report = import_kohya(tmp_path / "raw/kohya", output=tmp_path / "mine.toml", name="mine")

    config = load_config(tmp_path / "mine.toml", DatasetConfig)
    assert {source: config.sources[source].importer for source in config.sources} == {
        "1_style": "folder", "10_shinobu 1girl": "kohya",
    }  # fmt: skip
    assert {source.dataset for source in config.sources.values()} == {"mine"}
    assert [(rule.source, rule.repeats) for rule in config.plan.weights] == [("10_shinobu 1girl", 10)]
    assert captions_in(config) == {"a.jpg": "solo, smile", "b.jpg": "shinobu 1girl", "c.jpg": "sky"}
    assert len(report.left_out) == 2 and "0 repeats" in report.summary()
    assert report.metadata == (tmp_path / "mine.10_shinobu 1girl.json",)


def test_caption_and_tags_of_an_entry_are_joined_as_kohya_does(save, paint, tmp_path):
    for name in ("a.jpg", "sub/b.jpg"):
        save(name, paint(1))
    entries = {
        "a": {"caption": "a girl, sitting", "tags": "1girl, blue_hair"},
        "sub/b.jpg": {"tags": ["x_y", "a_tag", "o_o"]},
    }

    report = import_kohya(tmp_path / "raw", output=tmp_path / "o.toml", metadata=save("in.json", entries))

    assert json.loads(report.metadata[0].read_text()) == {
        "a.jpg": {"tags": "a girl, sitting, 1girl, blue_hair"}, "sub/b.jpg": {"tags": "x_y, a_tag, o_o"},
    }  # fmt: skip
    assert report.left_out == ("underscores of 2 words, which become spaces: a_tag, blue_hair",)


def test_tags_that_are_all_in_underscore_form_stay_so(save, paint, tmp_path):
    save("a.jpg", paint(1))
    save("a.txt", "1girl, blue_hair")

    report = import_kohya(tmp_path / "raw", output=tmp_path / "o.toml")

    assert report.left_out == ()
    policy = load_config(tmp_path / "o.toml", DatasetConfig).policies["default"]
    assert policy == {"groups": ["rest"], "tags": {"remove_underscores": False}}


def test_a_dataset_config_hands_down_its_settings(save, paint, tmp_path):
    save("pictures/a.jpg", paint(1))
    save("pictures/a.caption", "from the caption file")
    save("reg/b.jpg", paint(2))
    save("dc.toml", '[general]\nshuffle_caption = true\nnum_repeats = 2\n[[datasets]]\nresolution = 768\n'
         'class_tokens = "x"\n[[datasets.subsets]]\nimage_dir = "pictures"\n[[datasets.subsets]]\n'
         'image_dir = "reg"\nis_reg = true\n')  # fmt: skip

    report = import_kohya(tmp_path / "raw", output=tmp_path / "o.toml", dataset_config=tmp_path / "raw/dc.toml")

    config = load_config(tmp_path / "o.toml", DatasetConfig)
    assert captions_in(config) == {"a.jpg": "from the caption file"}
    assert config.plan.weights[0].repeats == 2
    assert any("resolution, shuffle_caption: settings of training" in line for line in report.left_out)
    assert any("regularisation" in line for line in report.left_out)


def test_pictures_without_an_entry_are_told(save, paint, tmp_path):
    save("a.jpg", paint(1))
    save("b.jpg", paint(2))
    in_json = save("in.json", {"a": {"tags": ["x", "y"]}})

    report = import_kohya(tmp_path / "raw", output=tmp_path / "o.toml", metadata=in_json)

    assert report.left_out[0].startswith("1 pictures of") and "b.jpg" in report.left_out[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[[datasets]]", r"needs at least one \[\[datasets.subsets\]\]"),
        ("x = 1", r"needs at least one \[\[datasets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "no image_dir"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "raw"\nnum_repeats = true', "num_repeats: must be a int"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "raw"\nis_reg = true', "no subset"),
        ("a = ", "not valid TOML"),
    ],
)
def test_a_wrong_dataset_config_is_refused(save, paint, tmp_path, config, message):
    save("a.jpg", paint(1))
    (tmp_path / "dc.toml").write_text(config)

    with pytest.raises(ConfigError, match=message):
        import_kohya(tmp_path, output=tmp_path / "o.toml", dataset_config=tmp_path / "dc.toml")
    assert not (tmp_path / "o.toml").exists()


def test_what_cannot_be_imported_is_refused(save, paint, tmp_path):
    save("a.jpg", paint(1))
    save("bad/b.jpg", paint(1))
    save("bad/b.txt", b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    twice = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "raw"\n[[datasets.subsets]]\nimage_dir = "raw"\n'
    (tmp_path / "twice.toml").write_text(twice)
    raw, output = tmp_path / "raw", tmp_path / "o.toml"

    for error, place, options, message in [
        (NotADirectoryError, tmp_path / "gone", {}, "no such folder"),
        (FileNotFoundError, raw, {"metadata": tmp_path / "gone.json"}, "no such in_json"),
        (ValueError, raw, {"metadata": tmp_path / "broken.json"}, "not valid JSON"),
        (ValueError, raw, {"metadata": tmp_path / "other.json"}, "none of its 2 pictures"),
        (ValueError, tmp_path / "empty", {}, "no pictures"),
        (ValueError, raw / "bad", {}, "not UTF-8"),
        (ValueError, tmp_path, {"dataset_config": tmp_path / "twice.toml"}, "two subsets"),
        (ValueError, raw, {"metadata": tmp_path / "x", "dataset_config": tmp_path / "y"}, "one of them"),
    ]:
        with pytest.raises(error, match=message):
            import_kohya(place, output=output, **options)
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        import_kohya(raw, output=output)


def test_the_commands(run, write_captions, tmp_path):
    for command in ("scan", "dedupe", "plan"):
        run(command)
    write_captions()
    run("pack")
    out = tmp_path / "kohya"

    assert run("export-kohya", str(out), "--chunk", "photos/0000")[0] == 0
    assert run("export-kohya", str(out), "--chunk", "nothing")[0] == 2
    code = cli.main(["import-kohya", str(out / "photos/0000"), "--metadata", str(out / "photos/0000.json"),
                     "--output", str(tmp_path / "back.toml")])  # fmt: skip
    assert code == 0
    back = [str(tmp_path / "back.toml"), "--workspace", str(tmp_path / "back")]
    assert cli.main(["scan", *back, "--workers", "0"]) == cli.main(["dedupe", *back]) == 0
    keys = read_parts(Workspace(tmp_path / "back").kept, ["key"])["key"].to_pylist()
    index = json.loads((out / "photos/0000.json").read_text())
    assert sorted(keys) == sorted(Path(name).stem for name in index)
