"""Every file is counted once, and the sums add up."""

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.report import make_report, render_text
from sharding.schema import DROPS, LISTING, MANIFEST, PLAN, Workspace
from sharding.tables import part_name, write_part

FATES = ("unscanned", "too_small", "undecodable", "undeduped", "duplicate", "unplanned", "no_period", "unpacked",
         "changed", "packed", "packed_twice", "packed_vanished")  # fmt: skip


def key_of(number: int) -> str:
    return f"{number:016x}"


def fill(workspace: Workspace, fates: list[str]) -> None:
    """Write the tables of a workspace in which file number n met fates[n]."""
    listing, manifest, kept, plan, packed = [], [], [], [], []
    drops: dict[str, list[dict]] = {"dedupe": [], "plan": [], "pack": []}
    for number, fate in enumerate(fates):
        file = {"source": f"s{number % 2}", "path": f"{number}.jpg"}
        listing.append(file | {"num_bytes": 100})
        if fate == "unscanned":
            continue
        status = fate if fate in ("too_small", "undecodable") else "kept"
        key = "" if fate == "undecodable" else key_of(number)
        record = dict.fromkeys(MANIFEST.names) | file | {
            "key": key, "num_bytes": 100, "status": status, "format": "jpeg", "width": 8, "height": 8,
            "is_pass_through": True,
        }  # fmt: skip
        manifest.append(record)
        if fate in ("too_small", "undecodable", "undeduped"):
            continue
        drop = dict.fromkeys(DROPS.names) | file | {"key": key, "kept_key": ""}
        if fate == "packed_twice":  # a byte-identical second file under the same key
            other = {"source": "s0", "path": f"copy-{number}.jpg"}
            listing.append(other | {"num_bytes": 100})
            manifest.append(record | other)
            drops["dedupe"].append(drop | other | {"stage": "dedupe", "reason": "identical"})
        if fate in ("duplicate", "packed_vanished"):
            drops["dedupe"].append(drop | {"stage": "dedupe", "reason": "near_duplicate"})
        if fate not in ("duplicate", "packed_vanished"):
            kept.append(record)
        if fate == "no_period":
            drops["plan"].append(drop | {"stage": "plan", "reason": "no_period"})
        if fate == "changed":
            drops["pack"].append(drop | {"stage": "pack", "reason": "changed_since_scan"})
        if fate in ("unpacked", "changed") or fate.startswith("packed"):
            plan.append({"key": key, "dataset": "d", "period": "", "chunk": 0, "position": number})
        if fate.startswith("packed"):
            packed.append(Sample(key, f"{key}.jpg", b"x", {}, "c", {"width": 8, "height": 8, "groups": []}))

    def write(path, rows, schema):
        write_part(path, pa.Table.from_pylist(rows, schema=schema), made_from="x")

    write(workspace.listing / part_name(0), listing, LISTING)
    write(workspace.manifest / part_name(0), manifest, MANIFEST)
    write(workspace.kept / part_name(0), kept, MANIFEST)
    write(workspace.dedupe / "drops" / part_name(0), drops["dedupe"], DROPS)
    write(workspace.plan / part_name(0), plan, PLAN)
    write(workspace.plan / "drops" / part_name(0), drops["plan"], DROPS)
    write(workspace.pack_drops / "d-0000.parquet", drops["pack"], DROPS)
    folder = workspace.chunks / "d" / "0000"
    shard, rows = write_shard(folder, 0, packed)
    commit_chunk(folder, rows, name="d/0000", shards=[shard], policy="p", shard_policy="p", made_from="m", seed=0)


def test_every_fate_is_counted_where_it_belongs(make_config, workspace):
    fill(workspace, list(FATES))

    report = make_report(make_config(), workspace)

    assert report.account == "13 files = 3 packed + 6 dropped + 4 waiting"
    assert {(one.stage, one.reason): one.num_files for one in report.drops} == {
        ("scan", "too_small"): 1, ("scan", "undecodable"): 1, ("dedupe", "identical"): 1,
        ("dedupe", "near_duplicate"): 1, ("plan", "no_period"): 1, ("pack", "changed_since_scan"): 1,
    }  # fmt: skip
    assert [(one.stage, one.num_files) for one in report.waiting] == [
        ("scan", 1), ("dedupe", 1), ("plan", 1), ("pack", 1),
    ]  # fmt: skip
    assert sum(source.num_bytes for source in report.sources) == 1_300
    [dataset] = report.datasets
    assert (dataset.num_images, dataset.num_chunks, dataset.num_packed_images) == (5, 1, 3)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FATES), min_size=1, max_size=20))
def test_the_sums_always_add_up(tmp_path_factory, make_config, fates):
    workspace = Workspace(tmp_path_factory.mktemp("w"))
    fill(workspace, fates)

    report = make_report(make_config(), workspace)

    assert report.adds_up
    assert report.num_files == len(fates) + fates.count("packed_twice")
    assert report.num_packed == sum(fate.startswith("packed") for fate in fates)


def test_the_text_opens_with_the_account_and_holds_the_tables(make_config, workspace):
    fill(workspace, list(FATES))

    text = render_text(make_report(make_config(), workspace))

    assert text.splitlines()[0] == "test: 13 files = 3 packed + 6 dropped + 4 waiting"
    for words in ("total images", "total chunk", "near_duplicate", "waiting for", "jpeg", "median 64"):
        assert words in text


def test_a_workspace_with_only_a_listing_waits_for_scan(make_config, workspace):
    rows = [{"source": "s", "path": "a.jpg", "num_bytes": 1}]
    write_part(workspace.listing / part_name(0), pa.Table.from_pylist(rows, schema=LISTING), made_from="x")

    report = make_report(make_config(), workspace)

    assert report.account == "1 files = 0 packed + 0 dropped + 1 waiting"
    assert report.waiting[0].stage == "scan"


def test_a_packed_file_that_is_not_listed_stands_beside_the_sum(make_config, workspace):
    fill(workspace, ["packed", "packed"])
    write_part(workspace.listing / part_name(0), LISTING.empty_table(), made_from="y")

    report = make_report(make_config(), workspace)

    assert (report.num_files, report.num_unlisted_packed) == (0, 2)
    assert "2 packed samples come from files that are not listed" in render_text(report)


@pytest.mark.parametrize("name", ["it's", "ünï"])
def test_workspace_paths_with_quotes_are_read(make_config, tmp_path, name):
    workspace = Workspace(tmp_path / name)
    fill(workspace, ["packed"])

    assert make_report(make_config(), workspace).num_packed == 1
