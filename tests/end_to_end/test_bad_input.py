"""Damaged files, a full disk and numbers that are not finite: one clear line, the right exit code, nothing lost."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"
ONE_EPOCH = ("data.epochs=1", "preview.prompts=[]")


def last_exit(run) -> int:
    return json.loads((run.root / "last_exit.json").read_text())["code"]


def nan_at(steps: tuple[int, ...], epochs: tuple[int, ...] = (0, 1)) -> None:
    """In the training process: the losses of these steps of these epochs are not numbers."""
    from training.recipes.stage_c import StageC

    loss = StageC.loss

    def poisoned(self, model, batch):
        found = loss(self, model, batch)
        if batch.step in steps and batch.identities[0].epoch in epochs:
            return type(found)(found.per_sample * torch.nan, found.weights, found.scalars)
        return found

    StageC.loss = poisoned


def die_before_undone_states_go() -> None:
    """In the training process: losses make it roll back, and it is killed when the ledger has said so."""
    import os

    from training import chunk_run

    nan_at((3, 4), (0,))
    chunk_run.remove_states = lambda folders: os._exit(9)


def disk_full_from(state_name: str) -> None:
    """In the training process: the disk is full when this state is written."""
    from training import tensor_file

    write = tensor_file.os.write

    def refuse(descriptor, data):
        if state_name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    tensor_file.os.write = refuse


def free_bytes_are(num_bytes: int, *, once_there_is: str = "") -> None:
    """In the training process: so much is free, from the moment on that there is a file of this name."""
    from collections import namedtuple

    usage = shutil.disk_usage
    Usage = namedtuple("Usage", "total used free")

    def measured(path):
        is_full = not once_there_is or any(Path(path).rglob(once_there_is))
        return Usage(10**12, 10**12 - num_bytes, num_bytes) if is_full else usage(path)

    shutil.disk_usage = measured


def miscount() -> None:
    """In the training process: every step says that it trained an image more."""
    from training.position import Position

    advance = Position.after_step
    Position.after_step = lambda self, *, num_images, **facts: advance(self, num_images=num_images + 1, **facts)


def test_a_chunk_whose_images_do_not_add_up_is_not_done(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH)

    code = run.train("--chunk", FIRST, prepare=miscount)

    assert code == 3
    assert "18 images were planned, but 23 trained + 0 skipped + 0 broken are 23" in run.errors()[0]
    assert run.events("chunk_done") == []


def test_a_truncated_shard_is_named_with_what_to_do(make_run, real_workspace, tmp_path):
    workspace = tmp_path / "workspace"
    shutil.copytree(real_workspace, workspace)
    shard = sorted((workspace / "chunks" / FIRST).glob("shard-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-1500])
    run = make_run(tmp_path / "run", *ONE_EPOCH, f"data.workspace='{workspace}'")

    code = run.train("--chunk", FIRST)

    assert code == last_exit(run) == 3
    (line,) = run.errors()
    assert f"shard {shard} has" in line and "python -m sharding verify" in line


def test_a_damaged_picture_is_counted_and_left_out(make_run, real_workspace, tmp_path):
    workspace = tmp_path / "workspace"
    shutil.copytree(real_workspace, workspace)
    from sharding.chunk import load_chunk

    chunk = load_chunk(workspace / "chunks" / FIRST)
    row = chunk.read_index().to_pylist()[0]
    shard = chunk.folder / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["image_offset"] : row["image_offset"] + row["image_bytes"]] = bytes(row["image_bytes"])
    shard.write_bytes(data)
    options = (*ONE_EPOCH, f"data.workspace='{workspace}'")
    unchecked = (*options, "data.verify_shards='size'")
    run = make_run(tmp_path / "run", *unchecked, "data.max_broken_fraction=0.1")
    strict = make_run(tmp_path / "strict", *unchecked)
    checked = make_run(tmp_path / "checked", *options, "data.max_broken_fraction=0.1")

    codes = [each.train("--chunk", FIRST) for each in (run, strict, checked)]

    assert codes == [0, 3, 3], run.log.read_text()
    assert f"the image {row['key']} at byte {row['image_offset']} has SHA-256" in checked.errors()[0]
    assert [line["keys"] for line in run.events("broken")] == [[row["key"]]]
    assert run.events("chunk_done")[0]["images_trained"] == 17
    assert "max_broken_fraction 0.01" in strict.errors()[0]


def test_when_all_states_are_damaged_the_run_stops_with_what_to_do(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH, "save.every_steps=1")
    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 3)
    states = sorted((run.root / "chunks" / FIRST).glob("state-????????"))
    for state in states:
        (state / "optimizer.safetensors").write_bytes(b"nothing")
    before = run.rows("metrics.jsonl")

    code = run.train("--chunk", FIRST)

    assert states and code == last_exit(run) == 3
    assert "no state that verifies" in run.errors()[-1] and "restore one of them from a copy" in run.errors()[-1]
    assert run.events("failed")[-1]["reason"].startswith("StateError")
    assert run.rows("metrics.jsonl") == before


def test_missing_and_wrong_weights_are_named(make_run, tiny_models, tmp_path):
    network = load_file(tiny_models / "stage_c.safetensors")
    wrong, narrow = tmp_path / "wrong.safetensors", tmp_path / "narrow"
    save_file({name: value for name, value in network.items() if "down_blocks.0.0." not in name}, wrong)
    lacking = tmp_path / "lacking.safetensors"
    save_file({name: value for name, value in network.items() if name != "clip_txt_mapper.bias"}, lacking)
    shutil.copytree(tiny_models / "text_encoder", narrow)
    half = load_file(narrow / "model.safetensors")
    for name, value in half.items():
        for axis in [axis for axis, size in enumerate(value.shape) if size == 64]:
            value = value.narrow(axis, 0, 32)
        half[name] = value.contiguous()
    save_file(half, narrow / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((narrow / "config.json").read_text()) | {"hidden_size": 32}
    (narrow / "config.json").write_text(json.dumps(config))
    cases = [
        ("network='nowhere.safetensors'", 2, "nowhere.safetensors"),
        (f"network='{wrong}'", 3, "wrong.safetensors: stage C weights: no complete 'down_blocks'"),
        (f"network='{lacking}'", 3, "lacking.safetensors: keys do not fit the model; 1 missing: clip_txt_mapper.bias"),
        (f"text_encoder='{narrow}'", 2, "do not belong together"),
        (f"effnet='{tiny_models}/previewer.safetensors'", 3, "previewer.safetensors: no key"),
    ]

    for number, (override, expected_code, words) in enumerate(cases):
        run = make_run(tmp_path / f"run{number}", *ONE_EPOCH, f"stage_c.{override}")
        code = run.train("--chunk", FIRST)
        assert (code, last_exit(run)) == (expected_code, expected_code), run.log.read_text()
        assert words in run.errors()[-1]


def test_frozen_weights_may_move_but_not_change(make_run, tiny_models, tmp_path):
    from scripts.demo_models.stage_c import make_stage_c_models

    others = make_stage_c_models(tmp_path / "others", seed=8)
    moved = shutil.copytree(tiny_models, tmp_path / "moved")
    run = make_run(tmp_path / "run", *ONE_EPOCH, "save.every_steps=1")
    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 2)

    refused = run.train("--chunk", FIRST, "--set", f"stage_c.effnet='{others['effnet']}'")
    allowed = run.train("--chunk", FIRST, "--set", f"stage_c.effnet='{moved}/effnet_encoder.safetensors'")

    assert (refused, allowed) == (2, 0), run.log.read_text()
    assert "stage_c.effnet: not what this run was started with" in run.errors()[0]


def test_a_disk_that_fills_while_saving_costs_nothing_that_was_saved(make_run, tmp_path):
    run, calm = make_run(tmp_path / "run", *ONE_EPOCH), make_run(tmp_path / "calm", *ONE_EPOCH)

    code = run.train("--chunk", FIRST, prepare=partial(disk_full_from, "state-00000004"))
    failed_exit = last_exit(run)
    states = [path.name for path in sorted((run.root / "chunks" / FIRST).glob("state-*"))]
    again = run.train("--chunk", FIRST)

    assert (code, failed_exit, again) == (1, 1, 0), run.log.read_text()
    assert states == ["state-00000002"]
    assert len(run.errors()) == 1 and "disk full while writing" in run.errors()[0]
    assert run.events("started")[1]["resumed_from"].endswith("state-00000002")
    assert run.events("failed")[0]["reason"].startswith("DiskFullError")
    assert calm.train("--chunk", FIRST) == 0
    assert run.final_files(FIRST) == calm.final_files(FIRST)


def test_a_disk_without_room_for_the_next_states_and_export_is_refused(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH)

    code = run.train("--chunk", FIRST, prepare=partial(free_bytes_are, 1_000_000))

    assert code == last_exit(run) == 1
    assert run.errors()[0].startswith("error: 3 more states of")
    assert "1.0 MB are free there: free some space" in run.errors()[0]
    assert run.rows("metrics.jsonl") == [] and list(run.root.glob("chunks/real/*/state-*")) == []
    assert run.train("--chunk", FIRST) == 0


def test_a_disk_without_room_for_an_export_ends_the_launch_behind_the_final_state(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH)
    folder = run.root / "chunks" / FIRST

    code = run.train("--chunk", FIRST, prepare=partial(free_bytes_are, 1_000, once_there_is="final/manifest.json"))
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(("final", "weights", "complete")))
    again = run.train("--chunk", FIRST)

    assert (code, again) == (1, 0), run.log.read_text()
    assert "an export (the chunk's final state is saved) needs" in run.errors()[0]
    assert left == ["final"]
    assert (folder / "weights" / "stage_c.safetensors").exists()
    assert run.last_step() == 5  # nothing was trained twice


def test_a_disk_that_fills_in_the_middle_of_an_export_leaves_no_half_of_it(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH, "stage_c.train_text_encoder=true")
    folder = run.root / "chunks" / FIRST

    code = run.train("--chunk", FIRST, prepare=partial(disk_full_from, "text_model.safetensors"))
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(("final", "weights", "complete")))
    again = run.train("--chunk", FIRST)

    assert (code, again) == (1, 0), run.log.read_text()
    assert "disk full while writing" in run.errors()[0]
    assert left == ["final"]
    names = {path.name for path in (folder / "weights").iterdir()}
    assert {"stage_c.safetensors", "text_model.safetensors"} <= names


def test_a_loss_that_is_not_a_number_passes_over_the_step_and_says_so(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH)

    code = run.train("--chunk", FIRST, prepare=partial(nan_at, (1,)))

    (skipped,) = run.events("skipped")
    (done,) = run.events("chunk_done")
    assert code == 0, run.log.read_text()
    assert (skipped["global_step"], skipped["reason"]) == (2, "not_finite")
    assert f"{FIRST} step 2 is passed over: a loss or gradient is not finite" in run.log.read_text()
    assert sorted(skipped["keys"]) == sorted(skipped["not_finite_keys"])
    assert done["images_trained"] == 18 - len(skipped["keys"])
    state = load_file(run.root / "chunks" / FIRST / "final" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_many_losses_in_a_row_that_are_no_numbers_end_the_launch_and_the_next_goes_on(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH, "max_skipped_steps=1")

    code = run.train("--chunk", FIRST, prepare=partial(nan_at, (2, 3, 4)))
    errors = run.errors()
    again = run.train("--chunk", FIRST)

    assert (code, again) == (1, 0), run.log.read_text()
    assert len(errors) == 1 and "2 steps in a row without a finite update" in errors[0]
    assert run.events("failed")[0]["global_step"] == 4
    assert "Traceback" not in run.log.read_text()


def test_after_losses_that_are_no_numbers_a_run_goes_back_once_and_passes_over_the_steps(make_run, tmp_path):
    run = make_run(tmp_path / "run", "max_skipped_steps=1", "preview.prompts=[]")

    code = run.train("--chunk", FIRST, prepare=partial(nan_at, (3, 4), (0,)))

    assert code == 0, run.log.read_text()
    (back,) = run.events("rolled_back")
    assert (back["from_global_step"], back["global_step"], back["pass_over"]) == (5, 2, [3, 4, 5])
    assert back["path"].endswith("state-00000002")
    passed_over = [line for line in run.events("skipped") if line["reason"] == "passed_over"]
    assert [line["global_step"] for line in passed_over] == [3, 4, 5]
    assert [row["global_step"] for row in run.rows("metrics.jsonl")] == list(range(1, 11))
    assert [row["global_step"] for row in run.rows("trace.jsonl")] == list(range(1, 11))
    (done,) = run.events("chunk_done")
    assert done["images_trained"] == 36 - sum(len(line["keys"]) for line in passed_over)
    assert done["applied_updates"] == 7


def test_a_run_that_gets_into_the_same_trouble_again_ends(make_run, tmp_path):
    run = make_run(tmp_path / "run", "max_skipped_steps=1", "preview.prompts=[]")

    code = run.train("--chunk", FIRST, prepare=partial(nan_at, (3, 4)))

    assert code == 1
    assert len(run.events("rolled_back")) == 1
    assert "2 steps in a row without a finite update" in run.errors()[0]
    assert run.train("--chunk", FIRST) == 0, "the last finite state is intact"


def test_a_kill_in_the_middle_of_a_rollback_does_not_bring_the_undone_states_back(make_run, tmp_path):
    run = make_run(tmp_path / "run", "max_skipped_steps=1", "preview.prompts=[]")

    run.train("--chunk", FIRST, prepare=die_before_undone_states_go)
    folder = run.root / "chunks" / FIRST
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-00000002", "state-00000004"]
    code = run.train("--chunk", FIRST)

    assert code == 0, run.log.read_text()
    assert run.events("started")[1]["resumed_from"].endswith("state-00000002")
    passed_over = [line for line in run.events("skipped") if line["reason"] == "passed_over"]
    assert [line["global_step"] for line in passed_over] == [3, 4, 5]


def test_a_kill_before_old_states_went_leaves_them_to_the_next_chunk(make_run, tmp_path):
    run = make_run(tmp_path / "run", *ONE_EPOCH)
    assert run.train("--chunk", FIRST) == 0
    folder = run.root / "chunks" / FIRST
    shutil.copytree(folder / "final", folder / "state-00000005")  # as if the launch had died right after `chunk_done`

    assert run.train("--chunk", SECOND) == 0

    assert [path.name for path in folder.iterdir() if path.name.startswith("state-")] == []
    assert (folder / "final").is_dir()
