"""A packed chunk in the eyes of others: img2dataset's layout, Hugging Face datasets, pandas, DuckDB; and the card."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.card import CardFacts, render_card, write_card
from sharding.chunk import list_chunks
from sharding.report import make_report
from sharding.schema import Workspace
from sharding.tables import read_parts


@pytest.fixture
def packed(run, write_captions, tmp_path) -> Workspace:
    for command in ("scan", "dedupe", "plan"):
        assert run(command)[0] == 0, run.err
    write_captions()
    assert run("pack")[0] == 0, run.err
    return Workspace(tmp_path / "ws")


def tars(workspace: Workspace) -> list[Path]:
    return [chunk.shard_path(shard.path) for chunk in list_chunks(workspace.chunks) for shard in chunk.info.shards]


def read_img2dataset(tar: Path) -> list[dict]:
    """Read the layout that img2dataset documents: KEY.jpg, KEY.txt, KEY.json with status, caption, width, height …"""
    samples: dict[str, dict] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            samples.setdefault(key, {"key": key})[ending] = archive.extractfile(member).read()
    for sample in samples.values():
        facts = json.loads(sample["json"], parse_constant=pytest.fail)
        assert facts["status"] == "success" and facts["error_message"] == ""
        assert facts["key"] == sample["key"] and facts["caption"] == sample["txt"].decode()
        assert isinstance(facts["exif"], str) and len(facts["sha256"]) == 64
        assert None not in facts.values()
        image = Image.open(io.BytesIO(sample.get("jpg") or sample["png"]))
        assert image.size == (facts["width"], facts["height"])
        assert facts["original_width"] >= 1 and facts["original_height"] >= 1
        sample["facts"] = facts
    return list(samples.values())


def test_an_img2dataset_reader_reads_every_sample(packed):
    samples = [sample for tar in tars(packed) for sample in read_img2dataset(tar)]

    assert sorted(sample["key"] for sample in samples) == sorted(read_parts(packed.plan, ["key"])["key"].to_pylist())
    kinds = {tuple((name, type(value)) for name, value in sorted(sample["facts"].items())) for sample in samples}
    assert len(kinds) == 1


def test_datasets_reads_tars_and_finds_them_by_the_card(packed, make_config, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    write_card(make_report(make_config(), packed), packed.root / "README.md", CardFacts())
    files = [str(tar) for tar in tars(packed)]

    direct = datasets.load_dataset(
        "webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"), streaming=False
    )
    by_card = datasets.load_dataset(str(packed.root), "photos", split="train", cache_dir=str(tmp_path / "cache"))

    assert len(direct) == len(by_card) == 6
    ours = {sample["key"]: sample for tar in tars(packed) for sample in read_img2dataset(tar)}
    for sample in direct:
        mine = ours[sample["__key__"]]
        assert sample["txt"] == "solo" and sample["json"]["caption"] == "solo"
        picture = np.asarray(Image.open(io.BytesIO(mine["jpg"])))
        assert np.array_equal(np.asarray(sample["jpg"]), picture)


def test_tables_and_index_open_in_pandas_and_duckdb(packed):
    pandas = pytest.importorskip("pandas")
    duckdb = pytest.importorskip("duckdb")

    [(joined,)] = duckdb.sql(
        f"select count(*) from '{packed.chunks}/photos/*/index-*.parquet' join '{packed.plan}/*.parquet' using (key) "
        f"join '{packed.manifest}/*.parquet' using (key) where status = 'kept'"
    ).fetchall()
    assert joined == 7  # one file lies there twice
    index = pandas.concat(pandas.read_parquet(path) for path in packed.chunks.glob("photos/*/index-*.parquet"))
    assert index["key"].is_unique and set(index["caption"]) == {"solo"}


# --- the card ---


def front_matter(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    head, matter, _ = text.split("---\n", 2)
    assert head == ""
    return yaml.safe_load(matter)


def test_the_card_names_what_is_packed_in_valid_yaml(packed, make_config):
    report = make_report(make_config(name="no"), packed)

    text = render_card(report, CardFacts("other", "faipl-1.0-sd", "LICENSE"))

    assert front_matter(text) == {
        "pretty_name": "no",
        "license": "other",
        "license_name": "faipl-1.0-sd",
        "license_link": "LICENSE",
        "task_categories": ["text-to-image"],
        "size_categories": ["n<1K"],
        "tags": ["webdataset"],
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": "train", "path": ["chunks/photos/[0-9]*/shard-*.tar"]}],
                **({"default": True} if name == "default" else {}),
            }
            for name in ("default", "photos")
        ],
    }
    assert "| **Total** | **6** | **2** |" in text and "8 files = 6 packed + 2 dropped" in text
    files = list(packed.root.glob("chunks/photos/[0-9]*/shard-*.tar"))
    assert sorted(files) == sorted(tars(packed))


def test_a_held_out_chunk_is_the_validation_split(packed, make_config):
    report = make_report(make_config(), packed)
    aside = replace(report.chunks[0], name="photos/held-out", is_held_out=True)

    card = render_card(replace(report, chunks=(*report.chunks, aside)), CardFacts())

    [_, validation] = front_matter(card)["configs"][0]["data_files"]
    assert validation == {"split": "validation", "path": ["chunks/photos/held-out/shard-*.tar"]}


@pytest.mark.parametrize(
    ("values", "message"), [({"license": "other"}, "--license-name"), ({"license_name": "x"}, "--license other")]
)
def test_half_a_license_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CardFacts(**values)


def test_the_command_writes_the_card_only_when_something_is_packed(run, write_captions, tmp_path):
    for command in ("scan", "dedupe", "plan"):
        run(command)
    assert run("card")[0] == 2 and "no chunk is packed" in run.err
    write_captions()
    run("pack")

    code, text = run("card", "--license", "mit", "--json")

    assert code == 0 and json.loads(text)["configs"] == ["default", "photos"]
    assert 'license: "mit"' in (tmp_path / "ws" / "README.md").read_text()
    assert run("card", "--license", "other")[0] == 2
