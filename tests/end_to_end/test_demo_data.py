"""The whole data side on the pictures that ship with the project: every file ends packed, or dropped with a reason."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sharding.chunk import iterate_samples, list_chunks
from sharding.schema import Workspace
from sharding.tables import read_parts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "scripts" / "demo_pictures"
EXPECTED = json.loads((PICTURES / "expected.json").read_text())
SOURCES = ("boards", "pixiv", "visual-novel", "wallpapers", "photos")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    from scripts.build_chunks import main
    from scripts.demo_models.captioning import make_captioning_models

    root = tmp_path_factory.mktemp("demo")
    models = make_captioning_models(root / "models", seed=1)
    overrides = [f"sources.{name}.root='{PICTURES / name}'" for name in SOURCES] + [
        f"annotate.models.wd.model='{models['wd']}'",
        f"annotate.models.aesthetic.model='{models['aesthetic']}'",
        f"annotate.models.quality.clip='{models['clip']}'",
        f"annotate.models.quality.head='{models['head']}'",
    ]
    words = [word for override in overrides for word in ("--set", override)]
    dataset = str(ROOT / "configs" / "datasets" / "demo.toml")
    assert main([dataset, "--workspace", str(root / "workspace"), "--workers", "2", *words]) == 0
    return Workspace(root / "workspace")


@pytest.fixture(scope="module")
def manifest(workspace) -> dict[str, dict]:
    """Rows by `source/path`."""
    return {f"{row['source']}/{row['path']}": row for row in read_parts(workspace.manifest).to_pylist()}


@pytest.fixture(scope="module")
def packed(workspace) -> set[str]:
    plain = [chunk for chunk in list_chunks(workspace.chunks) if not chunk.info.is_combined]
    return {key for chunk in plain for key in chunk.read_index().column("key").to_pylist()}


@pytest.fixture(scope="module")
def dropped(workspace) -> dict[str, dict]:
    """Rows of dedupe's drops by `source/path`."""
    return {f"{row['source']}/{row['path']}": row for row in read_parts(workspace.dedupe / "drops").to_pylist()}


def test_every_file_is_packed_or_dropped_with_a_reason(manifest, packed, dropped):
    refused = {name for name, row in manifest.items() if row["status"] != "kept"}
    in_chunks = {name for name, row in manifest.items() if row["key"] in packed and name not in dropped}

    assert len(manifest) == EXPECTED["num_files"]
    assert len(refused) + len(dropped) + len(in_chunks) == len(manifest)
    assert refused | set(dropped) | in_chunks == set(manifest)
    assert len(in_chunks) >= EXPECTED["kept_at_least"]


def test_the_planted_faults_are_found(manifest):
    assert all(manifest[name]["status"] in ("undecodable", "not_an_image", "empty_file") for name in EXPECTED["broken"])
    assert all(manifest[name]["status"] == "too_small" for name in EXPECTED["too_small"])
    assert all(manifest[name]["status"] == "animated" for name in EXPECTED["animated"])
    assert all(row["detail"] for row in manifest.values() if row["status"] != "kept")


def test_of_planted_duplicates_one_stays(manifest, dropped):
    for one, other in EXPECTED["near_duplicates"] + EXPECTED["exact_duplicates"]:
        names = [name for name in (one, other) if name in dropped]
        assert len(names) == 1, (one, other)
        assert dropped[names[0]]["kept_key"] in {row["key"] for row in manifest.values()}


def test_packed_pictures_are_upright_rgb_of_the_size_in_the_index(workspace, manifest):
    turned = {manifest[name]["key"]: manifest[name] for name in EXPECTED["rotated"]}
    seen = set()

    for chunk in list_chunks(workspace.chunks):
        rows = {row["key"]: row for row in chunk.read_index().to_pylist()}
        for key, data, facts, text in iterate_samples(chunk):
            picture = Image.open(io.BytesIO(data))
            assert picture.mode in ("RGB", "L")
            assert picture.size == (rows[key]["width"], rows[key]["height"]) == (facts["width"], facts["height"])
            assert picture.getexif().get(0x0112, 1) == 1
            assert text == rows[key]["caption"]
            if key in turned:
                assert picture.size == (turned[key]["width"], turned[key]["height"])
                seen.add(key)

    assert seen == set(turned)


def test_combined_chunks_hold_every_packed_picture_once(workspace, packed):
    combined = [chunk for chunk in list_chunks(workspace.chunks) if chunk.info.is_combined]

    keys = [key for chunk in combined for key in chunk.read_index().column("key").to_pylist()]

    assert sorted(keys) == sorted(packed)


def test_captions_stand_in_the_order_of_the_policy(workspace):
    order = ["aesthetic", "quality", "date", "custom", "rating", "character", "series", "rest"]

    for row in read_parts(workspace.captions("default")).to_pylist():
        groups = [group["group"] for group in row["groups"]]
        assert groups == sorted(groups, key=order.index)
        assert row["text"] == ", ".join(tag for group in row["groups"] for tag in group["tags"])
