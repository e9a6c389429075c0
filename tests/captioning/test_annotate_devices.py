"""The annotate loop on several devices, with images from chunks, with batch sizes found by trial."""

import json
import re
import shutil
import threading

import pytest

import captioning.annotate as annotate_module
from captioning.annotate import annotate
from captioning.batch_size import find_batch_size
from captioning.device_loop import DeviceLoop
from captioning.devices import parse_devices, split_device, torch_name
from captioning.onnx_session import open_session, provider_of
from captioning.plugin import ModelError
from captioning.torch_models import torch_device
from sharding import runlog
from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.config import ConfigError
from sharding.files import sha256_file
from sharding.images import BrokenFractionError
from sharding.schema import Workspace


def digests(lab):
    return {str(path): sha256_file(path) for path in sorted(lab.workspace.root.glob("annotations/*/*.parquet"))}


def forget(lab):
    shutil.rmtree(lab.workspace.root / "annotations")


def test_devices_share_the_parts_and_give_the_same_bytes(lab, model_tables):
    records = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(6)))
    lab.keep(*([row] for row in records))
    config = lab.annotate_config({name: model_tables[name] for name in ("wd", "quality", "date")})
    annotate(config, lab.workspace)
    expected = digests(lab)
    forget(lab)

    report = annotate(config, lab.workspace, devices=("cpu", "cpu"))

    assert digests(lab) == expected
    assert (report.num_parts, report.num_decodes, report.num_devices) == (6, 6, 2)
    assert report.num_rows == {"wd": 6, "quality": 6, "date": 6}


def test_an_error_on_one_device_ends_the_run(lab, model_tables, caplog):
    lab.keep(*(lab.save(b"no image %d" % n) for n in range(4)))
    config = lab.annotate_config({"wd": model_tables["wd"]}, max_broken_fraction=0.01)

    with pytest.raises(BrokenFractionError), caplog.at_level("ERROR"):
        annotate(config, lab.workspace, devices=("cpu", "cpu"))
    assert "one device has stopped, the others finish the parts that they are at: " in caplog.text
    with pytest.raises(ModelError, match="sees no such device"):
        tables = {"quality": model_tables["quality"]}
        lab.keep(lab.save(lab.png(60, 60)))
        annotate(lab.annotate_config(tables), lab.workspace, devices=("cuda:0", "cuda:1"))


def test_ctrl_c_does_not_wait_until_all_devices_have_finished_their_parts(lab, model_tables, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    was_stopped = threading.Event()
    originals = DeviceLoop.stop, DeviceLoop._wait_for
    monkeypatch.setattr(annotate_module, "wait", interrupted)
    monkeypatch.setattr(DeviceLoop, "stop", lambda self: (originals[0](self), was_stopped.set()))
    monkeypatch.setattr(DeviceLoop, "_wait_for", lambda self, it: (was_stopped.wait(10), originals[1](self, it))[1])
    lab.keep(*([row] for row in lab.save(*(lab.png(60 + n, 60) for n in range(4)))))

    with pytest.raises(KeyboardInterrupt):
        annotate(lab.annotate_config({"wd": model_tables["wd"]}), lab.workspace, devices=("cpu", "cpu"))

    assert was_stopped.is_set() and len(list(lab.workspace.annotations("wd").glob("part-*"))) < 2


def test_names_of_devices():
    assert parse_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert split_device("cuda:12") == ("cuda", 12) and split_device("xpu") == ("xpu", None)
    assert [torch_name(it) for it in ("cpu", "rocm:1", "openvino", "xpu:2")] == ["cpu", "cuda:1", "xpu", "xpu:2"]
    assert provider_of("cuda:1") == ("CUDAExecutionProvider", {"device_id": "1"})
    assert provider_of("xpu:1")[1]["device_type"] == "GPU.1"
    for wrong in ("gpu", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(ValueError, match="expected one of cpu, cuda"):
            split_device(wrong)
    with pytest.raises(ValueError, match="stands twice"):
        parse_devices("cuda:0,cuda:0")


def test_a_wrong_device_on_the_command_line_is_bad_usage(lab, capsys):
    from captioning import cli

    path = lab.folder / "d.toml"
    path.write_text(f'name = "d"\nsources.boards.root = "{lab.pictures}"\n')

    assert cli.main(["annotate", str(path), "--devices", "cuda:0,gpu"]) == 2
    assert "device 'gpu': expected one of cpu, cuda" in capsys.readouterr().err


def test_the_live_line_counts_only_what_is_to_do(lab, model_tables, monkeypatch, caplog):
    records = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(5)))
    lab.keep(records[:2], records[2:])
    config = lab.annotate_config({"wd": model_tables["wd"]})
    annotate(config, lab.workspace, part_index=0, num_parts=2)
    monkeypatch.setattr(runlog, "EVERY_SECONDS", 0.0)

    with caplog.at_level("INFO"):
        annotate(config, lab.workspace)

    lines = [line for line in caplog.messages if line.startswith("annotate  ")]
    assert len(lines) == 3
    assert re.fullmatch(r"annotate  3 of 3 images  [\d.]+/s  eta 0m00s waiting \d+%", lines[-1])


def test_a_wrong_device_is_a_mistake_in_the_config(lab):
    with pytest.raises(ConfigError, match=r"annotate.device.*'gpu': expected one of"):
        lab.config(annotate={"device": "gpu"})


@pytest.mark.parametrize(("device", "package"), [("cuda:0", "caption,gpu"), ("xpu", "onnxruntime-openvino")])
def test_a_missing_provider_says_what_to_install(demo_models, device, package):
    with pytest.raises(ModelError, match=package):
        open_session(demo_models["wd"] / "model.onnx", device)


def test_torch_never_falls_back_to_the_cpu():
    for device, build in (("cuda", "CUDA"), ("rocm:1", "ROCm"), ("xpu", "XPU")):
        with pytest.raises(ModelError, match=f"annotate.device '{device}': .* sees no such device: .*{build} build"):
            torch_device(device)


# --- batch size ---


class Device:
    """Runs on a clock of its own: so many images at once take as long as one."""

    def __init__(self, *, at_once, memory):
        self.at_once, self.memory, self.now, self.calls = at_once, memory, 0.0, []

    def __call__(self, size):
        self.calls.append(size)
        if size > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.now += -(-size // self.at_once)


@pytest.mark.parametrize(
    ("at_once", "memory", "found"), [(16, 1000, 16), (64, 20, 16), (1, 1000, 1), (9999, 9999, 256)]
)
def test_batches_double_until_memory_is_full_or_nothing_is_gained(at_once, memory, found):
    device = Device(at_once=at_once, memory=memory)

    assert find_batch_size(device, name="wd", clock=lambda: device.now) == found


def test_other_errors_are_passed_on_and_so_is_one_image_that_does_not_fit():
    with pytest.raises(RuntimeError, match="out of memory"):
        find_batch_size(Device(at_once=1, memory=0), name="wd")
    with pytest.raises(ZeroDivisionError):
        find_batch_size(lambda size: 1 / 0, name="wd")


def test_the_batch_size_that_was_found_is_used_again(lab, model_tables, monkeypatch):
    from captioning import loaded_models

    lab.keep(lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(4))))
    tried = []
    monkeypatch.setattr(loaded_models, "find_batch_size", lambda call, name: (tried.append(name), call(3), 3)[2])
    config = lab.config(
        annotate={"models": {"wd": model_tables["wd"]}, "workers": 0, "batch_size": "auto"}, max_broken_fraction=0.5
    )
    annotate(config, lab.workspace)
    found = json.loads((lab.workspace.annotations("wd") / "batch_size.json").read_text())
    expected = digests(lab)
    for path in lab.workspace.annotations("wd").glob("part-*"):
        path.unlink()

    annotate(config, lab.workspace)

    assert tried == ["wd"] and found["batch_size"] == 3
    assert digests(lab) == expected


def test_a_trial_changes_no_row(lab, model_tables):
    lab.keep(lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(4))))
    tables = {name: model_tables[name] for name in ("wd", "quality")}
    rows = []
    for batch_size in (1, "auto"):
        annotate(lab.config(annotate={"models": tables, "workers": 0, "batch_size": batch_size}), lab.workspace)
        rows.append((lab.rows("wd"), lab.rows("quality")))
        forget(lab)

    (wd, quality), (other_wd, other_quality) = rows
    for key in wd:
        assert wd[key]["tag_ids"] == other_wd[key]["tag_ids"]
        assert wd[key]["tag_probs"] == pytest.approx(other_wd[key]["tag_probs"], abs=1e-6)
        assert quality[key]["score"] == pytest.approx(other_quality[key]["score"], abs=1e-6)


# --- images from chunks ---


def pack(lab, records, name="boards/0000"):
    """Write a chunk with the records' files as they are."""
    folder = lab.workspace.chunks / name
    row = {
        "width": 64, "height": 64, "groups": [], "dataset": "boards", "period": "", "repeats": 1, "loss_weight": 1.0,
    }  # fmt: skip
    samples = [
        Sample(it["key"], f"{it['key']}.png", (lab.pictures / it["path"]).read_bytes(), {}, "", row) for it in records
    ]
    shard, rows = write_shard(folder, 0, samples)
    facts = {"policy": "p", "shard_policy": "p", "made_from": "m", "seed": 0}
    commit_chunk(folder, rows, name=name, shards=[shard], **facts)
    return folder


@pytest.mark.parametrize("how", ["the folder is gone", "asked for"])
def test_images_are_read_from_chunks_with_the_same_rows(lab, model_tables, how):
    records = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(5)))
    lab.keep(records[:3], records[3:])
    config = lab.annotate_config({"wd": model_tables["wd"]})
    annotate(config, lab.workspace)
    expected = digests(lab)
    forget(lab)
    pack(lab, records[:2])
    pack(lab, records[2:], name="boards/0001")
    shutil.rmtree(lab.pictures)
    if how == "asked for":
        lab.pictures.mkdir()

    annotate(config, lab.workspace, chunks=["boards/0000", "boards/0001"] if how == "asked for" else None)

    assert digests(lab) == expected


def test_what_is_not_in_the_chunks_is_read_from_its_file_and_damage_is_recorded(lab, model_tables):
    records = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(3)))
    lab.keep(records)
    folder = pack(lab, records[:2])
    (shard,) = folder.glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[data.index(b"IEND") - 9] ^= 1  # in the first image, whose file is whole
    shard.write_bytes(data)

    annotate(lab.annotate_config({"wd": model_tables["wd"]}), lab.workspace, chunks=["all"])

    assert [row["status"] for row in lab.rows("wd").values()] == ["unreadable", "ok", "ok"]
    with pytest.raises(FileNotFoundError, match=r"of chunks alone make a source, with the importer webdataset"):
        annotate(lab.annotate_config({"wd": model_tables["wd"]}), Workspace(lab.folder / "other"), chunks=["all"])
    with pytest.raises(ConfigError, match=r"--chunks boards/0009: no such chunk in .*; there are boards/0000"):
        annotate(lab.annotate_config({"wd": model_tables["wd"]}), lab.workspace, chunks=["boards/0009"])
