"""Waves: chunk k of every dataset, mixed."""

import shutil
from dataclasses import asdict
from itertools import pairwise

import pytest

from sharding.chunk import (
    ChunkError,
    ChunkInfo,
    Sample,
    commit_chunk,
    iterate_samples,
    list_chunks,
    open_chunk,
    seal,
    write_shard,
)
from sharding.combine import combine
from sharding.files import write_json
from sharding.schema import Workspace
from sharding.verify import verify

SEED_CARD = {
    "newest": (1_848_331, 232), "recent": (1_380_630, 173), "mid": (993_227, 125), "early": (566_152, 71),
    "oldest": (160_397, 21), "pixiv": (343_614, 43), "visual novel cg": (231_358, 29), "anime wallpaper": (104_790, 14),
}  # fmt: skip


def add_chunk(workspace: Workspace, name: str, count: int, *, caption: str = "a", policy: str = "default") -> None:
    dataset = name.split("/")[0]
    samples = [
        Sample(
            key=f"{abs(hash((name, number))) % 16**16:016x}",
            image_name=f"{abs(hash((name, number))) % 16**16:016x}.jpg",
            image=f"{name} {number}".encode(),
            facts={"caption": caption, "dataset": dataset},
            caption=caption,
            row={"width": 8, "height": 8, "groups": [], "dataset": dataset, "period": "", "repeats": 1,
                 "loss_weight": 1.0},
        )
        for number in range(count)
    ]  # fmt: skip
    folder = workspace.chunks / name
    shard, rows = write_shard(folder, 0, samples)
    commit_chunk(folder, rows, name=name, shards=[shard], policy=policy, shard_policy=policy, made_from="x", seed=0)


@pytest.fixture
def config(make_config):
    return make_config(combine={"chunk_size": 8}, pack={"shard_size": 3})


def combined(workspace: Workspace) -> list[str]:
    return [chunk.name for chunk in list_chunks(workspace.chunks) if chunk.info.is_combined]


def test_every_sample_of_a_wave_is_in_exactly_one_combined_chunk(config, workspace):
    add_chunk(workspace, "a/0000", 10)
    add_chunk(workspace, "b/0000", 7)
    add_chunk(workspace, "a/0001", 5)

    report = combine(config, workspace)

    assert combined(workspace) == [
        "combined/0000-0000",
        "combined/0000-0001",
        "combined/0000-0002",
        "combined/0001-0000",
    ]
    wave = [open_chunk(workspace.chunks / name) for name in report.waves[0].chunks]
    assert sorted(chunk.info.num_samples for chunk in wave) == [5, 6, 6]
    images = [image for chunk in wave for _, image, _, _ in iterate_samples(chunk)]
    expected = [f"a/0000 {n}".encode() for n in range(10)] + [f"b/0000 {n}".encode() for n in range(7)]
    assert sorted(images) == sorted(expected) != images
    assert not list((workspace.chunks / "combined").rglob("*.tar"))


def test_the_report_tells_the_mixture_and_its_drift(config, workspace):
    add_chunk(workspace, "a/0000", 6)
    add_chunk(workspace, "b/0000", 2)
    add_chunk(workspace, "a/0001", 6)

    first, second = combine(config, workspace).waves

    assert first.fractions() == {"a": 0.75, "b": 0.25}
    assert (first.drift, second.drift) == (0, 0.25)


def test_combining_again_changes_nothing_and_is_deterministic(config, workspace):
    add_chunk(workspace, "a/0000", 10)
    combine(config, workspace)
    before = {path: path.read_bytes() for path in workspace.chunks.rglob("*") if path.is_file()}

    assert [wave.state for wave in combine(config, workspace).waves] == ["current"]
    shutil.rmtree(workspace.chunks / "combined")
    combine(config, workspace)

    assert {path: path.read_bytes() for path in workspace.chunks.rglob("*") if path.is_file()} == before


def test_a_combined_chunk_whose_shards_are_gone_is_stale(config, workspace):
    add_chunk(workspace, "a/0000", 4)
    combine(config, workspace)
    opened = open_chunk(workspace.chunks / "combined/0000-0000")
    shutil.rmtree(workspace.chunks / "a")

    with pytest.raises(ChunkError, match=r"combined/0000-0000: stale: 1 of 1 shards"):
        open_chunk(opened.folder)
    with pytest.raises(ChunkError, match="stale"):
        opened.read_index()
    assert combined(workspace) == ["combined/0000-0000"]


def test_new_chunks_renew_their_wave_but_not_a_trained_one(config, workspace):
    for name in ("a/0000", "a/0001"):
        add_chunk(workspace, name, 9)
    combine(config, workspace)
    seal(open_chunk(workspace.chunks / "combined/0000-0001"), "r1")
    add_chunk(workspace, "b/0000", 9)
    add_chunk(workspace, "b/0001", 2)

    report = combine(config, workspace)

    assert [wave.state for wave in report.waves] == ["sealed", "written"]
    assert len(combined(workspace)) == 4
    assert (workspace.chunks / "a/0000/trained-by-r1").exists()
    assert [problem for problem in verify(workspace) if "decode" not in str(problem)] == []


def test_combined_chunks_that_no_wave_needs_are_removed(config, make_config, workspace):
    add_chunk(workspace, "a/0000", 16)
    combine(config, workspace)

    report = combine(make_config(combine={"chunk_size": 20}), workspace)

    assert report.removed == ("combined/0000-0001",)
    assert combined(workspace) == ["combined/0000-0000"]


def test_materialized_chunks_have_tars_of_their_own(config, workspace):
    add_chunk(workspace, "a/0000", 5)
    add_chunk(workspace, "b/0000", 3)
    combine(config, workspace)
    pointed = list(iterate_samples(open_chunk(workspace.chunks / "combined/0000-0000")))

    combine(config, workspace, materialize=True)
    shutil.rmtree(workspace.chunks / "a")

    chunk = open_chunk(workspace.chunks / "combined/0000-0000")
    assert list(iterate_samples(chunk)) == pointed
    assert [shard.num_samples for shard in chunk.info.shards] == [3, 3, 2]


def test_chunks_with_captions_of_different_policies_are_not_mixed(config, workspace):
    add_chunk(workspace, "a/0000", 2, policy="one")
    add_chunk(workspace, "b/0000", 2, policy="two")

    with pytest.raises(ChunkError, match="wave 0000: captions of one, two"):
        combine(config, workspace)


def test_a_dataset_may_not_have_the_name_of_the_combined_folder(make_config, workspace):
    add_chunk(workspace, "a/0000", 2)

    with pytest.raises(ValueError, match=r"combine\.name: 'a' is also a dataset"):
        combine(make_config(combine={"name": "a"}), workspace)


def test_a_dry_run_writes_nothing(config, workspace):
    add_chunk(workspace, "a/0000", 2)

    report = combine(config, workspace, dry_run=True)

    assert report.waves[0].chunks == ("combined/0000-0000",)
    assert combined(workspace) == []
    assert "--dry-run" in report.summary()


def test_the_waves_of_the_seed_cards_708_chunks(make_config, workspace):
    """After wave 13 the wallpapers are used up, after wave 20 the oldest; only the newest reach wave 231."""
    for name, (count, num_chunks) in SEED_CARD.items():
        for number in range(num_chunks):
            info = ChunkInfo(
                name=f"{name}/{number:04d}", num_samples=min(8_000, count - 8_000 * number), shards=(), index="i",
                index_sha256="", policy="p", shard_policy="p", made_from="x", seed=0,
            )  # fmt: skip
            write_json(workspace.chunks / name / f"{number:04d}" / "chunk.json", asdict(info))

    report = combine(make_config(combine={"chunk_size": 4_000}), workspace, dry_run=True)

    waves = report.waves
    assert len(waves) == 232
    assert sum(sum(wave.num_samples.values()) for wave in waves) == 5_628_499
    assert waves[0].num_samples == dict.fromkeys(SEED_CARD, 8_000)
    assert len(waves[0].chunks) == 16 and waves[4].chunks[5] == "combined/0004-0005"
    assert waves[13].num_samples["anime wallpaper"] == 790 and "anime wallpaper" not in waves[14].num_samples
    assert waves[20].num_samples["oldest"] == 397 and "oldest" not in waves[21].num_samples
    assert waves[231].num_samples == {"newest": 331}
    drifts = [wave.drift for wave in waves]
    assert drifts[:13] == [0.0] * 13
    assert drifts[14] == pytest.approx(1 / 8) and drifts[22] == pytest.approx(2 / 8) and drifts[231] == 7 / 8
    assert all(later > earlier - 1e-9 for earlier, later in pairwise(drifts))
    assert "0014   56,000" in report.summary()
