import shutil
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from sharding.dedupe import TABLES, dedupe
from sharding.duplicates.candidates import DuplicateKeyError
from sharding.files import digest_of
from sharding.scan import scan
from sharding.schema import DROPS, GROUPS, MANIFEST, PLAN, RELATIVES
from sharding.tables import list_parts, part_name, read_part, read_parts, schema_mismatch, write_part

BASE = int("5a" * 32, 16)


def flip(*bits):
    """A 256-bit hash that differs from BASE in these bits."""
    value = BASE
    for bit in bits:
        value ^= 1 << bit
    return value.to_bytes(32, "big")


def other(seed):
    return np.random.default_rng(seed).bytes(32)


@pytest.fixture
def write_manifest(workspace):
    """Write manifest parts from rows with few fields; each list of rows is a part."""

    def write(*parts):
        for number, rows in enumerate(parts):
            full = []
            for row in rows:
                sha256 = row.get("sha256") or digest_of(row["path"])
                full.append(
                    {
                        "key": sha256[:16], "sha256": sha256, "dataset": "photos", "source": "photos",
                        "num_bytes": 1000, "format": "jpeg", "width": 100, "height": 100, "mode": "RGB",
                        "has_alpha": False, "is_animated": False, "is_pass_through": True, "created_at": None,
                        "date_source": "", "phash": other(len(row["path"])), "rating": "", "tags_general": [],
                        "tags_character": [], "tags_copyright": [], "tags_artist": [], "tags_meta": [], "custom": [],
                        "status": "kept", "detail": "", **row,
                    }
                )  # fmt: skip
            table = pa.Table.from_pylist(full, schema=MANIFEST)
            write_part(workspace.manifest / part_name(number), table, made_from=digest_of(str(full)))

    return write


def key_of(path):
    return digest_of(path)[:16]


def kept_paths(workspace):
    return [row["path"] for row in read_parts(workspace.kept).to_pylist()]


def drops(workspace):
    return {row["path"]: row for row in read_parts(workspace.dedupe / "drops").to_pylist()}


def all_bytes(workspace):
    folders = (workspace.kept, *(workspace.dedupe / name for name in TABLES))
    return {str(path): path.read_bytes() for folder in folders for path in list_parts(folder)}


# --- which one stays ---


@pytest.mark.parametrize(
    ("rule", "better"),
    [
        ("priority", {"source": "wall", "width": 10}),
        ("pixels", {"width": 101, "num_bytes": 10}),
        ("lossless", {"format": "png", "num_bytes": 10}),
        ("bytes", {"num_bytes": 1001}),
        ("date", {"created_at": datetime(2001, 1, 1, tzinfo=UTC)}),
    ],
)
def test_each_rule_decides_when_those_before_it_are_equal(
    write_manifest, make_config, workspace, tmp_path, rule, better
):  # fmt: skip
    worse = {"path": "worse.jpg", "phash": flip(1, 2)}
    write_manifest([worse, {"path": "better.jpg", "phash": flip(), **better}])
    root = {"root": str(tmp_path)}
    config = make_config(sources={"photos": root, "wall": {**root, "priority": 1}})

    report = dedupe(config, workspace)

    assert kept_paths(workspace) == ["better.jpg"]
    drop = drops(workspace)["worse.jpg"]
    assert (drop["reason"], drop["kept_key"], drop["distance"]) == ("near_duplicate", key_of("better.jpg"), 2)
    assert drop["detail"].startswith(f"{rule}: ")
    groups = read_parts(workspace.dedupe / "groups")
    assert schema_mismatch(groups, GROUPS) == ""
    assert groups.to_pylist() == [
        {"group": 0, "key": key_of("better.jpg"), "is_keeper": True, "distance": 0, "rule": rule, "kind": ""},
        {"group": 0, "key": key_of("worse.jpg"), "is_keeper": False, "distance": 2, "rule": rule, "kind": "near"},
    ]
    assert (report.num_files, report.num_kept, report.dropped, report.num_groups) == (2, 1, {"near_duplicate": 1}, 1)


def test_the_order_of_rules_is_the_configs_and_the_key_breaks_ties(write_manifest, make_config, workspace):
    large = {"path": "large.jpg", "phash": flip(1), "width": 200}
    heavy = {"path": "heavy.jpg", "phash": flip(2), "num_bytes": 9000}
    write_manifest([large, heavy, {"path": "x.jpg", "phash": other(1)}, {"path": "y.jpg", "phash": other(1)}])

    dedupe(make_config(dedupe={"keeper": ["bytes", "pixels"]}), workspace)

    assert kept_paths(workspace) == ["heavy.jpg", min("x.jpg", "y.jpg", key=key_of)]


def test_what_is_farther_than_the_radius_stays(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "phash": flip()}, {"path": "b", "phash": flip(*range(5))}])

    dedupe(make_config(dedupe={"radius": 4}), workspace)

    assert kept_paths(workspace) == ["a", "b"]
    assert read_parts(workspace.dedupe / "drops").num_rows == 0
    assert schema_mismatch(read_parts(workspace.dedupe / "drops"), DROPS) == ""


def test_a_chain_is_cut_where_it_leaves_the_keeper(write_manifest, make_config, workspace):
    chain = [{"path": str(n), "phash": flip(*range(4 * n)), "num_bytes": 1000 - n} for n in range(6)]
    write_manifest(chain)

    dedupe(make_config(dedupe={"radius": 4, "max_diameter": 8}), workspace)

    assert kept_paths(workspace) == ["0", "3"]
    assert {path: row["distance"] for path, row in drops(workspace).items()} == {"1": 4, "2": 8, "4": 4, "5": 8}


def test_flat_pictures_are_never_compared(write_manifest, make_config, workspace):
    write_manifest([{"path": "white", "phash": bytes(32)}, {"path": "black", "phash": bytes(32)}])

    report = dedupe(make_config(), workspace)

    assert kept_paths(workspace) == ["white", "black"] and report.num_degenerate == 2


def test_only_what_scan_kept_takes_part(write_manifest, make_config, workspace):
    write_manifest(
        [{"path": "a", "phash": flip(), "status": "too_small", "width": 900}, {"path": "b", "phash": flip()}]
    )

    dedupe(make_config(), workspace)

    assert kept_paths(workspace) == ["b"]


# --- identical bytes ---


def test_identical_bytes_collapse_across_parts_and_sources(write_manifest, make_config, workspace, tmp_path):
    sha256 = digest_of("same")
    write_manifest(
        [{"path": "a.jpg", "sha256": sha256}],
        [{"path": "b.jpg", "sha256": sha256, "source": "wall"}, {"path": "c.jpg", "sha256": sha256}],
    )
    root = {"root": str(tmp_path)}

    report = dedupe(make_config(sources={"photos": root, "wall": {**root, "priority": 1}}), workspace)

    assert kept_paths(workspace) == ["b.jpg"]
    assert {path: (row["reason"], row["kept_key"]) for path, row in drops(workspace).items()} == {
        "a.jpg": ("identical_bytes", sha256[:16]), "c.jpg": ("identical_bytes", sha256[:16]),
    }  # fmt: skip
    assert report.dropped == {"identical_bytes": 2}
    rules = [row["rule"] for row in read_parts(workspace.dedupe / "groups").to_pylist()]
    assert rules == ["exact"] * 3


def test_copies_of_a_dropped_picture_go_to_its_keeper(write_manifest, make_config, workspace):
    sha256 = digest_of("small")
    small = [{"path": f"small{n}", "sha256": sha256, "phash": flip(3), "tags_general": [f"t{n}"]} for n in range(2)]
    write_manifest([*small, {"path": "large", "width": 500, "phash": flip()}])

    report = dedupe(make_config(), workspace)

    assert kept_paths(workspace) == ["large"]
    assert {row["kept_key"] for row in drops(workspace).values()} == {key_of("large")}
    assert read_parts(workspace.kept).column("tags_general").to_pylist() == [["t0", "t1"]]
    assert (report.num_kept, report.dropped) == (1, {"near_duplicate": 2})


def test_two_files_under_one_key_are_an_error_that_names_both(write_manifest, make_config, workspace):
    same = "ab" * 8
    write_manifest([{"path": "a", "sha256": same + "0" * 48}, {"path": "b", "sha256": same + "1" * 48}])

    with pytest.raises(DuplicateKeyError, match=f"key {same}: .*photos/a, photos/b"):
        dedupe(make_config(), workspace)

    assert not workspace.kept.exists()


# --- what the keeper inherits ---


def test_tags_date_and_rating_of_the_dropped_go_to_the_keeper(write_manifest, make_config, workspace):
    day = datetime(2014, 5, 6, tzinfo=UTC)
    write_manifest(
        [{"path": "keeper", "width": 500, "phash": flip(), "tags_general": ["sky", "1girl"]}],
        [
            {"path": "x", "phash": flip(1), "tags_general": ["tree", "sky"], "tags_artist": ["a"], "created_at": day,
             "date_source": "post", "rating": "explicit"},
            {"path": "y", "phash": flip(2), "tags_general": ["cat"], "created_at": day.replace(year=2019)},
        ],
    )  # fmt: skip

    dedupe(make_config(), workspace)

    (row,) = read_parts(workspace.kept).to_pylist()
    assert row["tags_general"] == ["sky", "1girl", "cat", "tree"]
    assert (row["tags_artist"], row["created_at"], row["date_source"]) == (["a"], day, "post")
    assert row["rating"] == "explicit"
    assert schema_mismatch(read_parts(workspace.kept), MANIFEST) == ""


def test_without_merging_the_keeper_stays_as_it_was(write_manifest, make_config, workspace):
    write_manifest([{"path": "k", "width": 500, "phash": flip()}, {"path": "x", "phash": flip(1), "tags_meta": ["m"]}])

    dedupe(make_config(dedupe={"merge_tags": False}), workspace)

    assert read_parts(workspace.kept).column("tags_meta").to_pylist() == [[]]


# --- the plan ---


def write_plan(workspace, *paths):
    rows = [
        {"key": key_of(path), "dataset": "photos", "period": "", "chunk": 0, "position": n, "repeats": 1,
         "loss_weight": 1.0}
        for n, path in enumerate(paths)
    ]  # fmt: skip
    write_part(workspace.plan / part_name(0), pa.Table.from_pylist(rows, schema=PLAN), made_from="x")


def test_a_planned_picture_stays_and_the_better_copy_is_dropped_with_that_reason(
    write_manifest, make_config, workspace
):  # fmt: skip
    write_manifest(
        [
            {"path": "planned", "phash": flip()},
            {"path": "better", "width": 900, "phash": flip(1)},
            {"path": "worse", "width": 50, "phash": flip(2)},
        ]
    )
    write_plan(workspace, "planned")

    report = dedupe(make_config(), workspace)

    assert kept_paths(workspace) == ["planned"]
    assert drops(workspace)["better"]["reason"] == "better_copy_of_planned"
    assert drops(workspace)["worse"]["reason"] == "near_duplicate"
    assert report.dropped == {"near_duplicate": 1, "better_copy_of_planned": 1}


def test_planning_what_was_kept_leaves_dedupe_current(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "width": 200}, {"path": "b"}, {"path": "far", "phash": flip(*range(40))}])
    dedupe(make_config(), workspace)

    write_plan(workspace, "a", "far")
    assert dedupe(make_config(), workspace).is_current
    write_plan(workspace, "b", "far")
    assert not dedupe(make_config(), workspace).is_current
    assert kept_paths(workspace) == ["b", "far"]


def test_two_planned_pictures_of_one_group_both_stay(write_manifest, make_config, workspace):
    write_manifest([{"path": str(n), "phash": flip(n)} for n in range(3)])
    write_plan(workspace, "0", "1")

    dedupe(make_config(), workspace)

    assert kept_paths(workspace) == ["0", "1"]


# --- parts ---


def test_a_second_dedupe_does_nothing_and_a_forced_one_gives_the_same_bytes(write_manifest, make_config, workspace):
    write_manifest(
        *([{"path": f"{p}{n}", "phash": flip(n, p)} for n in range(3)] + [{"path": f"o{p}"}] for p in range(3))
    )
    first = dedupe(make_config(), workspace)
    before = all_bytes(workspace)

    second = dedupe(make_config(), workspace)
    for path in list_parts(workspace.kept) + list_parts(workspace.dedupe / "groups"):
        path.unlink()
    third = dedupe(make_config(), workspace)

    assert (first.is_current, second.is_current, third.is_current) == (False, True, False)
    assert (second.num_kept, second.dropped, second.parts_made) == (first.num_kept, first.dropped, 0)
    assert all_bytes(workspace) == before


def test_new_files_leave_untouched_parts_alone(write_manifest, make_config, workspace):
    parts = [[{"path": f"{n}", "phash": other(n), "tags_general": ["x"]}] for n in range(10, 13)]
    write_manifest(*parts)
    dedupe(make_config(), workspace)
    times = {path.name: path.stat().st_mtime_ns for path in list_parts(workspace.kept)}

    new = [{"path": "new", "phash": other(11), "tags_general": ["y"], "num_bytes": 10}]
    write_manifest(*parts, new)
    report = dedupe(make_config(), workspace)

    after = {path.name: path.stat().st_mtime_ns for path in list_parts(workspace.kept)}
    assert report.parts_made == 2
    assert [name for name in times if after[name] != times[name]] == ["part-00001.parquet"]
    assert read_part(workspace.kept / part_name(1)).column("tags_general").to_pylist() == [["x", "y"]]
    assert read_part(workspace.kept / part_name(3)).num_rows == 0


def test_kept_parts_from_an_interrupted_run_are_noticed(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "phash": flip()}, {"path": "b", "phash": flip(1, 2, 3)}])
    dedupe(make_config(), workspace)
    whole = all_bytes(workspace)

    other_config = make_config(dedupe={"radius": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharding.dedupe.make_drops", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dedupe(other_config, workspace)
    assert all_bytes(workspace) != whole
    report = dedupe(make_config(), workspace)

    assert not report.is_current and all_bytes(workspace) == whole


def test_parts_that_no_longer_belong_are_removed(write_manifest, make_config, workspace):
    write_manifest([{"path": "a"}], [{"path": "bb"}])
    dedupe(make_config(), workspace)

    (workspace.manifest / part_name(1)).unlink()
    dedupe(make_config(), workspace)

    assert [path.name for path in list_parts(workspace.kept)] == [part_name(0)]


def test_a_dry_run_counts_and_writes_nothing(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "phash": flip()}, {"path": "b", "phash": flip(1)}])

    report = dedupe(make_config(), workspace, dry_run=True)

    assert (report.num_kept, report.dropped, report.is_dry_run) == (1, {"near_duplicate": 1}, True)
    assert not workspace.dedupe.exists()


def test_nothing_to_dedupe_and_nothing_kept(write_manifest, make_config, workspace):
    with pytest.raises(FileNotFoundError, match="sharding scan"):
        dedupe(make_config(), workspace)

    write_manifest([{"path": "a", "status": "empty_file", "key": "", "sha256": "", "phash": b""}])

    assert dedupe(make_config(), workspace).num_kept == 0
    assert read_parts(workspace.kept).num_rows == 0


def test_a_manifest_of_another_hash_size_or_with_missing_parts_is_refused(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "phash": bytes(8)}])

    with pytest.raises(ValueError, match=r"64 bits.*256 bits; run .*scan"):
        dedupe(make_config(), workspace)

    write_part(workspace.listing / part_name(4), pa.table({"x": [1]}), made_from="x")
    with pytest.raises(ValueError, match=r"1 of the listed parts are missing, first part-00004"):
        dedupe(make_config(), workspace)


# --- from files ---


def test_pictures_in_other_sizes_and_formats_are_found_across_sources(
    save, paint, make_config, workspace, tmp_path, hamming
):
    for seed in range(4):
        image = paint(seed, 400, 300)
        save(f"a/{seed}.png", image)
        save(f"b/{seed}.jpg", image.resize((300, 225)), quality=60)
        save(f"b/{seed}.webp", image.resize((200, 150)), quality=70)
    sources = {name: {"root": str(tmp_path / "raw" / name)} for name in ("a", "b")}
    config = make_config(sources=sources)
    scan(config, workspace, workers=0)

    report = dedupe(config, workspace)

    assert kept_paths(workspace) == [f"{seed}.png" for seed in range(4)]
    assert (report.dropped, report.num_groups) == ({"near_duplicate": 8}, 4)
    manifest = {row["key"]: row for row in read_parts(workspace.manifest).to_pylist()}
    for row in drops(workspace).values():
        assert row["distance"] == hamming(manifest[row["key"]]["phash"], manifest[row["kept_key"]]["phash"])


# --- references, turns and the second look, from pictures ---


def test_a_reference_is_only_compared_against_and_everything_adds_up(save, paint, make_config, workspace, tmp_path):
    for seed in range(3):
        save(f"test/{seed}.jpg", paint(seed, 400, 300), quality=50)
    save("train/same.jpg", (tmp_path / "raw/test/0.jpg").read_bytes())
    save("train/larger.png", paint(1, 800, 600))
    save("train/other.png", paint(9, 400, 300))
    sources = {
        name: {"root": str(tmp_path / "raw" / name), "is_reference": name == "test"} for name in ("test", "train")
    }
    config = make_config(sources=sources)
    scan(config, workspace, workers=0)

    report = dedupe(config, workspace)

    assert kept_paths(workspace) == ["other.png"]
    assert report.dropped == {"duplicate_of_reference": 2, "reference": 3}
    assert {path: row["distance"] is None for path, row in drops(workspace).items()} == {
        "0.jpg": True, "1.jpg": True, "2.jpg": True, "same.jpg": False, "larger.png": False,
    }  # fmt: skip
    assert drops(workspace)["0.jpg"]["detail"] == "source test is a reference"
    assert drops(workspace)["larger.png"]["kept_key"] == drops(workspace)["1.jpg"]["key"]


def test_crops_and_variants_by_switch(save, paint, make_config, workspace):
    image = paint(0, 800, 600)
    save("whole.png", image)
    save("crop.png", image.crop((250, 0, 650, 600)))
    variant = image.copy()
    variant.paste((255, 0, 0), (300, 200, 380, 260))
    save("variant.png", variant)
    config = make_config(dedupe={"keep_variants": True, "find_crops": True})
    scan(config, workspace, workers=0)
    dedupe(config, workspace)

    assert drops(workspace).keys() == {"crop.png"}
    assert drops(workspace)["crop.png"]["reason"] == "cropped_copy"
    assert drops(workspace)["crop.png"]["distance"] is None
    relatives = read_parts(workspace.dedupe / "relatives")
    assert schema_mismatch(relatives, RELATIVES) == "" and relatives.num_rows == 2
    assert set(relatives.column("component").to_pylist()) == {0}
    assert set(read_parts(workspace.kept).column("sketch").to_pylist()) == {b""}
    assert read_parts(workspace.dedupe / "groups").column("kind").to_pylist() == ["", "crop"]

    plain = make_config()
    scan(plain, workspace, workers=0)
    dedupe(plain, workspace)
    assert set(drops(workspace)) < {"whole.png", "variant.png"} and "crop.png" in kept_paths(workspace)


def test_turns_that_were_not_scanned_are_asked_for(write_manifest, make_config, workspace):
    write_manifest([{"path": "a", "phash": flip(), "turned_phashes": b""}])

    with pytest.raises(ValueError, match=r"turned_phashes of 0 bits.*turns mean 256 bits; run .*scan"):
        dedupe(make_config(dedupe={"turns": ["mirror"]}), workspace)


def test_adding_files_searches_only_them_and_gives_what_a_fresh_run_gives(save, paint, make_config, workspace):
    config = make_config()
    for seed in range(6):
        save(f"{seed}.png", paint(seed, 400, 300))
    scan(config, workspace, workers=0)
    assert dedupe(config, workspace).num_searched == 6

    save("new.jpg", paint(2, 400, 300).resize((300, 225)))
    save("other.jpg", paint(77, 400, 300))
    scan(config, workspace, workers=0)
    report = dedupe(config, workspace)
    grown = all_bytes(workspace)
    shutil.rmtree(workspace.dedupe)
    dedupe(config, workspace)

    assert report.num_searched == 3  # the new ones, and the one that has the hash of a new one
    assert report.dropped == {"near_duplicate": 1}
    assert all_bytes(workspace) == grown
