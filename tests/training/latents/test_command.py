"""Encoding with counting encoders, and loading what was encoded, against loading pixels."""

import json
import pickle
import shutil

import pytest
import torch

from sharding.chunk import open_chunk
from tests.training.chunks import make_chunk
from tests.training.latents.conftest import NAME, CountingEncoder
from training.chunk_data import ChunkData, ChunkSource, make_loader
from training.errors import BrokenDataError
from training.inspect_run import inspect_plan
from training.latents.ahead import ahead_of
from training.latents.command import encode_latents
from training.latents.parts import LatentsError
from training.plans import batch_plan, caption_settings, pixel_settings, still_pixel_settings
from training.run_dir import RunDir
from training.validation import validation_plan


def run(config, **options):
    return list(encode_latents(config, **options))


def load(config, chunk, *, epoch=0, ahead=True):
    """Return the batches of an epoch, from latents or from pixels."""
    data = data_from(config, chunk, epoch=epoch, ahead=ahead)
    return [data[item] for item in range(len(data))]


def data_from(config, chunk, *, epoch=0, ahead=True):
    index, pixels, captions = chunk.read_index(), pixel_settings(config), caption_settings(config)
    plans = [batch_plan(index, chunk.name, config=config, epoch=one) for one in range(config.data.epochs)]
    found = None
    if ahead:
        found = ahead_of(index, plans, config=config, pixels=pixels, captions=captions, from_main=lambda ask: ask())
    return ChunkData(
        ChunkSource.of_chunk(chunk), plans[epoch], rank=0, world_size=1, pixels=pixels, captions=captions, ahead=found
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"horizontal_flip": True, "epochs": 2}},
        {"data": {"crop": "focus", "horizontal_flip": True}},
        {"data": {"crop": "focus", "masks": False}},
        {"batch": {"remainder": "merge", "merge_max_crop_loss": 0.5}, "data": {"epochs": 2}},
    ],
    ids=["plain", "flips", "focus", "focus without masks", "merged remainders"],
)
def test_a_run_from_latents_sees_what_a_run_from_pixels_sees(make_config, chunk, encoders, changes):
    config = make_config(**changes)
    run(config)

    for epoch in range(config.data.epochs):
        pixels, latents = load(config, chunk, epoch=epoch, ahead=False), load(config, chunk, epoch=epoch)

        assert len(pixels) == len(latents)
        for one, other in zip(pixels, latents, strict=True):
            assert other.images is None
            good = ~one.is_broken
            assert torch.equal(encoders["image"].encode(one.images).values[good], other.latents[good])
            assert not other.latents[~good].any()
            assert (one.masks is None) == (other.masks is None)
            assert one.masks is None or torch.equal(one.masks, other.masks)
            assert one.broken == other.broken
            for name in ("step", "number", "identities", "captions", "crops", "original_sizes", "datasets"):
                assert getattr(one, name) == getattr(other, name), name
            assert torch.equal(one.loss_weights, other.loss_weights)
            assert torch.equal(one.is_broken, other.is_broken)
    assert any(batch.masks is not None for batch in latents) == config.data.masks
    assert [reason.partition(":")[0] for batch in latents for _, reason in batch.broken] == ["not_an_image"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stored_latents_are_the_encoders_rounded_to_the_format(make_config, chunk, encoders, dtype):
    config = make_config(latents={"dtype": dtype})
    run(config)

    for one, other in zip(load(config, chunk, ahead=False), load(config, chunk), strict=True):
        exact = encoders["image"].encode(one.images).values
        stored = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert other.latents.dtype == stored
        good = ~one.is_broken
        assert torch.equal(exact.to(stored)[good], other.latents[good])


def test_text_outputs_come_with_their_captions(make_config, chunk, encoders):
    config = make_config(latents={"use": False, "text": True}, caption={"prefix": "photo,"})
    run(config)

    batches = load(config, chunk)

    assert encoders["text"].num_encoded == 24
    for batch in batches:
        expected = encoders["text"].encode(batch.captions)
        assert batch.images is not None
        assert all(torch.equal(*pair) for pair in zip(batch.text, expected, strict=True))


def test_a_second_time_nothing_is_encoded_and_only_what_is_missing_is_made(make_config, workspace, encoders):
    config = make_config()
    assert run(config)[-1] == "5 parts made; left out: not_an_image 1"
    made = encoders["image"].num_encoded

    assert run(config)[-1] == "0 parts made"
    assert encoders["image"].num_encoded == made

    (manifest,) = workspace.glob("latents/*/newest/0000/*/part-00002.json")
    before = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    manifest.unlink()
    assert run(config)[-1] == "1 parts made"
    assert encoders["image"].num_encoded == made + 5
    assert {path.name: path.read_bytes() for path in manifest.parent.iterdir()} == before


def test_tasks_share_the_parts_and_together_make_what_one_makes(make_config, workspace, tmp_path, encoders):
    config = make_config()
    for task in (2, 0, 1):
        run(config, part_index=task, num_parts=3, output=tmp_path / "three")
    run(config, output=tmp_path / "one")

    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("part-*"))}

    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) == 15


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(make_config, workspace, encoders):
    lines = run(make_config(), dry_run=True)

    assert lines[0].startswith("newest/0000 latents: 24 rows in 5 parts, 5 to be made in ")
    assert not (workspace / "latents").exists()
    assert encoders["image"].num_encoded == 0


def test_verify_reads_everything_and_names_damage(make_config, workspace, encoders):
    config = make_config()
    run(config)
    assert run(config, verify=True)[-1] == "all there, all as written"
    (path,) = workspace.glob("latents/*/newest/0000/*/part-00001.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)

    with pytest.raises(LatentsError, match=r"1 problems:\n.*part-00001.bin: SHA-256"):
        run(config, verify=True)


def test_damaged_values_end_the_launch_and_name_the_file(make_config, chunk, workspace, encoders):
    config = make_config()
    run(config)
    (path,) = workspace.glob("latents/*/newest/0000/*/part-00001.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)

    with pytest.raises(LatentsError, match=r"part-00001.bin: damaged"):
        load(config, chunk)
    assert len(load(make_config(data={"verify_shards": "size"}), chunk)) > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"data": {"crop": "focus"}}, "of another encoder or other settings"),
        ({"buckets": {"resolution": [96, 96]}}, "of another encoder or other settings"),
        ({"stage_c": {"encode_scale": 1.0}}, "of another encoder or other settings"),
        ({"latents": {"dtype": "bf16"}}, "of another encoder or other settings"),
        ({"data": {"horizontal_flip": True}}, "of other pictures, sizes, flips or captions"),
        ({"latents": {"text": True}}, ""),
    ],
)
def test_missing_and_stale_latents_are_refused_with_the_command(make_config, chunk, encoders, changes, reason):
    if changes:
        run(make_config())

    with pytest.raises(LatentsError) as caught:
        load(make_config(**changes), chunk)

    assert reason in str(caught.value)
    assert "run `python -m training encode-latents RUN.toml --chunk newest/0000" in str(caught.value)
    assert ("--text`" in str(caught.value)) == ("text" in changes.get("latents", {}))


def test_plan_warns_of_latents_that_are_not_there_yet(make_config, encoders):
    config = make_config()

    def warnings():
        return [f.text for f in inspect_plan(config, None, chunk_name=NAME, with_state=True).findings]

    assert any("5 of 5 parts of its latents are missing" in text for text in warnings())
    run(config)
    assert not any("latents" in text for text in warnings())


def test_another_encoder_is_another_folder(make_config, chunk, encoders):
    config = make_config()
    run(config)
    from training.latents import store

    store._encoder_digests.cache_clear()
    encoders["image"] = CountingEncoder(version="2")

    with pytest.raises(LatentsError, match="of another encoder"):
        load(config, chunk)


def test_new_captions_need_no_new_latents(make_config, chunk, workspace, encoders):
    config = make_config()
    run(config)
    made = encoders["image"].num_encoded
    rows = chunk.read_index().to_pylist()
    for row in rows:
        row["caption"] = "new words"
    from sharding.chunk import commit_chunk

    commit_chunk(
        chunk.folder, rows, name=NAME, shards=list(chunk.info.shards), policy="other", shard_policy="default",
        made_from="", seed=0,
    )  # fmt: skip

    assert run(config)[-1] == "0 parts made"
    assert encoders["image"].num_encoded == made
    assert {one for batch in load(config, open_chunk(chunk.folder)) for one in batch.captions} == {"new words"}


def test_the_encoders_file_is_not_needed_to_train(make_config, chunk, encoders, monkeypatch):
    config = make_config()
    run(config)
    import training.recipes.encoders
    from training.latents import store

    def gone(config, device):
        raise FileNotFoundError("effnet: gone")

    monkeypatch.setattr(training.recipes.encoders, "load_image_encoder", gone)
    store._encoder_digests.cache_clear()

    assert len(load(config, chunk)) > 0
    assert store.encoder_digests(config, "latents") == encoders["image"].digests()
    with pytest.raises(FileNotFoundError, match="effnet: gone"):
        load(make_config(latents={"dtype": "bf16"}), chunk)


def test_without_its_file_an_encoder_among_several_is_not_guessed(make_config, chunk, encoders, monkeypatch):
    config = make_config()
    run(config)
    from training.latents import store

    store._encoder_digests.cache_clear()
    encoders["image"] = CountingEncoder(version="2")
    run(config)
    store._encoder_digests.cache_clear()

    def gone(config, device):
        raise FileNotFoundError("effnet: gone")

    monkeypatch.setattr("training.recipes.encoders.load_image_encoder", gone)
    with pytest.raises(LatentsError, match="effnet: gone; of its latents there are those of 2 encoders"):
        load(config, chunk)


def test_workers_encode_and_read_as_the_training_process_does(make_config, chunk, encoders, tmp_path):
    config, workers = make_config(), make_config(data={"workers": 1})
    run(config, output=tmp_path / "one")
    run(workers, output=tmp_path / "two")

    files = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("part-*")} for name in ("one", "two")]
    assert files[0] == files[1]
    ahead = data_from(make_config(latents={"folder": tmp_path / "two"}), chunk)
    loader = make_loader(ahead, workers=1)
    for item, batch in enumerate(loader):
        assert torch.equal(batch.latents, ahead[item].latents)
    assert item == len(ahead) - 1


def test_validation_reads_latents_cut_at_the_centre_whatever_training_does(make_config, workspace, encoders):
    name = "newest/held-out"
    held_out = make_chunk(workspace / "chunks" / name, num_samples=9, name=name, is_held_out=True)
    config = make_config(data={"crop": "focus", "horizontal_flip": True}, validation={"chunk": name, "max_images": 7})
    lines = run(config)

    index, pixels, captions = held_out.read_index(), still_pixel_settings(config), caption_settings(config)
    plan = validation_plan(index, name, config=config)
    ahead = ahead_of(index, [plan], config=config, pixels=pixels, captions=captions, from_main=lambda ask: ask())
    source = ChunkSource.of_chunk(held_out)
    data, plain = (ChunkData(source, plan, rank=0, world_size=1, pixels=pixels, ahead=a) for a in (ahead, None))

    assert any(line.startswith(f"{name} latents: 7 rows") for line in lines)
    for item in range(len(data)):
        assert torch.equal(data[item].latents, encoders["image"].encode(plain[item].images).values)


def test_a_run_that_has_started_a_chunk_gets_the_latents_of_its_copy(make_config, chunk, tmp_path, encoders):
    config, run_dir = make_config(), RunDir(tmp_path / "run")
    started = run_dir.start_chunk(chunk)
    make_chunk(chunk.folder, num_samples=6)

    run(config, root=run_dir.root)

    assert len(load(config, started)) > 0
    with pytest.raises(LatentsError, match="of other pictures"):
        load(config, open_chunk(chunk.folder))


def test_shards_are_not_needed_but_for_masks(make_config, chunk, encoders):
    config = make_config(data={"masks": False})
    run(config)
    for shard in chunk.info.shards:
        chunk.shard_path(shard.path).unlink()

    assert len(load(config, chunk)) > 0


def test_values_that_the_format_cannot_hold_are_left_out_and_broken_in_training(make_config, chunk, encoders):
    encoders["image"] = CountingEncoder(offset=65_504 - 128)
    config = make_config(latents={"dtype": "fp16"}, data={"max_broken_fraction": 1.0})
    lines = run(config)

    broken = {reason for batch in load(config, chunk) for _, reason in batch.broken}

    assert "left out: latents_overflow" in lines[-1]
    assert any(reason.startswith("latents_overflow: ") and "set latents.dtype" in reason for reason in broken)
    assert all(torch.isfinite(batch.latents).all() for batch in load(config, chunk))


def test_too_many_broken_pictures_end_the_command_before_the_part_is_there(make_config, workspace, encoders):
    encoders["image"] = CountingEncoder(offset=float("nan"))

    with pytest.raises(BrokenDataError, match=r"not_finite.*max_broken_fraction 0.2"):
        run(make_config())

    assert list(workspace.glob("latents/*/newest/0000/*/part-*")) == []


def test_what_travels_to_a_worker_is_small_and_works_there(make_config, chunk, encoders):
    config = make_config()
    run(config)
    index, pixels, captions = chunk.read_index(), pixel_settings(config), caption_settings(config)
    plans = [batch_plan(index, chunk.name, config=config, epoch=0)]
    ahead = ahead_of(index, plans, config=config, pixels=pixels, captions=captions, from_main=lambda ask: ask())
    data = ChunkData(ChunkSource.of_chunk(chunk), plans[0], rank=0, world_size=1, pixels=pixels, ahead=ahead)
    first = data[0]

    travelled = pickle.loads(pickle.dumps(data))
    data.close()

    assert len(pickle.dumps(ahead)) < 1_000
    assert torch.equal(travelled[0].latents, first.latents)
    travelled.close()


def test_encoder_json_tells_people_what_lies_there(make_config, workspace, encoders):
    run(make_config())

    (path,) = workspace.glob("latents/latents-*/encoder.json")

    described = json.loads(path.read_text())
    assert described["encoder"] == encoders["image"].digests()
    assert described["rule"]["crop"] == "centre"
    assert described["rule"]["dtype"] == "fp32"
    shutil.rmtree(path.parent)
