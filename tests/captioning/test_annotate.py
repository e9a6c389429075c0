"""The annotate loop: one decode per image, resuming, broken images, workers that die."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import decode
from captioning.annotate import annotate
from captioning.decode import Decoders, ImageTask, WorkerDiedError
from captioning.plugin import ModelError
from sharding import images
from sharding.config import ConfigError
from sharding.files import sha256_file
from sharding.images import BrokenFractionError
from sharding.tables import part_metadata, part_name, read_part


@pytest.fixture
def decodes(monkeypatch):
    """Count calls of decode_rgb in this process, by the bytes decoded."""
    calls = []
    original = images.decode_rgb
    monkeypatch.setattr(
        images, "decode_rgb", lambda data, **options: (calls.append(data), original(data, **options))[1]
    )
    return calls


def part_path(lab, model, number=0):
    return lab.workspace.annotations(model) / part_name(number)


def digests(lab):
    return {str(path): sha256_file(path) for path in sorted(lab.workspace.root.glob("annotations/*/*.parquet"))}


def test_four_models_share_one_decode_per_image(lab, model_tables, decodes):
    files = [lab.png(80 + n, 60, seed=n) for n in range(5)]
    records = lab.save(*files)
    lab.keep(records[:3], records[3:])

    report = annotate(lab.annotate_config(model_tables), lab.workspace)

    assert sorted(decodes) == sorted(files)
    assert report.num_decodes == report.num_images == 5
    assert report.num_rows == {"wd": 5, "aesthetic": 5, "quality": 5, "date": 5}
    for model in model_tables:
        for number, part in enumerate((records[:3], records[3:])):
            table = read_part(part_path(lab, model, number))
            assert table.column("key").to_pylist() == [row["key"] for row in part]
            assert table.column("status").to_pylist() == ["ok"] * len(part)
    assert len(lab.rows("wd")[records[0]["key"]]["rating_probs"]) == 4
    facts = part_metadata(part_path(lab, "wd"))
    assert facts["model"] == model_tables["wd"]["model"] and facts["revision"].startswith("sha256:")
    assert facts["preprocessing"] == "wd/demo/1"
    labels = read_part(lab.workspace.annotations("wd") / "labels.parquet")
    assert labels.column("name").to_pylist()[:5] == ["general", "sensitive", "questionable", "explicit", "1girl"]


def test_a_current_part_is_not_looked_at_again(lab, model_tables, decodes):
    lab.keep(lab.save(lab.png(64, 64)))
    config = lab.annotate_config({name: model_tables[name] for name in ("wd", "date")})
    annotate(config, lab.workspace)
    before = digests(lab)

    report = annotate(config, lab.workspace)

    assert (len(decodes), report.num_decodes, report.num_parts_current) == (1, 0, 1)
    assert digests(lab) == before


def test_a_new_model_or_setting_runs_alone(lab, model_tables):
    lab.keep(lab.save(lab.png(64, 64)))
    annotate(lab.annotate_config(model_tables), lab.workspace, models=["wd", "date"])

    added = annotate(lab.annotate_config(model_tables), lab.workspace)
    changed = annotate(lab.annotate_config(model_tables | {"wd": model_tables["wd"] | {"floor": 0.5}}), lab.workspace)

    assert added.num_rows == {"wd": 0, "aesthetic": 1, "quality": 1, "date": 0}
    assert changed.num_rows == {"wd": 1, "aesthetic": 0, "quality": 0, "date": 0}
    assert all(prob >= 0.5 for row in lab.rows("wd").values() for prob in row["tag_probs"])


def test_captions_are_not_made_of_two_revisions_of_a_scorer(lab, model_tables):
    from captioning.compose import compose
    from captioning.part_input import AnnotationMissingError

    tiers = {"quality": {"model": "quality", "comparison": ">", "steps": [[-1.0, "scored"]]}}
    policies = {"default": {"groups": ["quality"], "tiers": tiers}}
    lab.keep(lab.save(lab.png(64, 64)), lab.save(lab.png(65, 64)))
    annotate(lab.annotate_config({"quality": model_tables["quality"]}), lab.workspace)
    config = lab.annotate_config({"quality": model_tables["quality"] | {"clip_crop": "openai"}}, policies=policies)
    annotate(config, lab.workspace, part_index=0, num_parts=2)

    with pytest.raises(AnnotationMissingError, match=r"quality/part-00001.*another model, or .*, than part-00000"):
        compose(config, lab.workspace, policy="default")
    annotate(config, lab.workspace)
    assert compose(config, lab.workspace, policy="default").num_captions == 2


def test_only_added_keys_are_decoded_and_old_rows_stay(lab, model_tables, decodes):
    old = lab.save(lab.png(64, 64, seed=1), lab.png(70, 64, seed=2))
    lab.keep(old)
    config = lab.annotate_config(model_tables)
    annotate(config, lab.workspace)
    rows_before = lab.rows("wd")
    new = lab.save(lab.png(90, 64, seed=3))
    decodes.clear()

    lab.keep([old[1], *new, old[0]])
    report = annotate(config, lab.workspace)

    assert (len(decodes), report.num_decodes) == (1, 1)
    assert report.num_rows == {"wd": 1, "aesthetic": 1, "quality": 1, "date": 3}
    assert report.num_rows_reused == {"wd": 2, "aesthetic": 2, "quality": 2}
    rows = lab.rows("wd")
    assert list(rows) == [old[1]["key"], new[0]["key"], old[0]["key"]]
    assert {key: rows[key] for key in rows_before} == rows_before


def test_a_new_date_reaches_the_date_scores_without_a_decode(lab, model_tables):
    (row,) = lab.save(lab.png(64, 64))
    lab.keep([row])
    annotate(lab.annotate_config({name: model_tables[name] for name in ("wd", "date")}), lab.workspace)

    lab.keep([row | {"created_at": None}])
    report = annotate(lab.annotate_config({name: model_tables[name] for name in ("wd", "date")}), lab.workspace)

    assert report.num_decodes == 0 and report.without_result == {"no_date": 1}
    assert lab.rows("date")[row["key"]] == {"key": row["key"], "score": None, "status": "no_date"}


def test_broken_images_get_rows_with_the_reason_and_the_others_their_results(lab, model_tables):
    whole = lab.png(64, 64)
    records = lab.save(whole, lab.png(65, 64)[:-40], b"<html>", lab.png(66, 64), lab.png(67, 64))
    lab.keep(records)
    before = annotate(lab.annotate_config(model_tables), lab.workspace)

    statuses = [row["status"] for row in lab.rows("aesthetic").values()]

    assert statuses == ["ok", "undecodable", "not_an_image", "ok", "ok"]
    assert [row["status"] for row in lab.rows("wd").values()] == statuses
    assert [row["status"] for row in lab.rows("date").values()] == ["ok"] * 5
    assert before.without_result == {"undecodable": 1, "not_an_image": 1}
    assert "no result, undecodable: 1" in before.summary()


def test_too_many_broken_images_stop_the_run_after_the_part_is_written(lab, model_tables):
    lab.keep(lab.save(lab.png(64, 64), b"no image"), lab.save(lab.png(65, 64)))
    models = {"wd": model_tables["wd"]}
    strict = lab.annotate_config(models, max_broken_fraction=0.04)  # less than one of 20

    for _ in range(2):  # the second run decodes nothing and is not taken for a success
        with pytest.raises(BrokenFractionError, match=r"1 of 2 images up to here .* = 0\.04; .*--retry"):
            annotate(strict, lab.workspace)

    assert len(lab.rows("wd")) == 2 and not part_path(lab, "wd", 1).exists()
    assert annotate(lab.annotate_config(models), lab.workspace).num_rows["wd"] == 1


def test_a_recorded_failure_is_current_until_the_record_changes_or_a_retry_is_asked_for(lab, model_tables):
    records = lab.save(*(lab.png(64 + n, 64) for n in range(4)))
    gone, changed = (lab.pictures / records[n]["path"] for n in (0, 1))
    data = gone.read_bytes()
    gone.unlink()
    changed.write_bytes(changed.read_bytes() + b"\0")
    lab.keep(records)
    config = lab.annotate_config({"quality": model_tables["quality"]})
    first = annotate(config, lab.workspace)

    again = annotate(config, lab.workspace)
    gone.write_bytes(data)
    retried = annotate(config, lab.workspace, retry=True)
    (lab.pictures / "moved.png").write_bytes(lab.png(65, 64))
    records[1]["path"] = "moved.png"
    lab.keep(records)
    moved = annotate(config, lab.workspace)

    assert first.without_result == {"unreadable": 1, "changed_since_scan": 1} and first.num_decodes == 2
    assert (again.num_images, again.num_parts_written) == (0, 0)
    assert retried.without_result == {"changed_since_scan": 1} and retried.num_decodes == 1
    assert (moved.num_images, moved.num_decodes, moved.without_result) == (1, 1, {})
    assert [row["status"] for row in lab.rows("quality").values()] == ["ok"] * 4
    assert annotate(config, lab.workspace, retry=True).num_images == 0


def test_captions_follow_when_a_retry_finds_another_file_than_before(lab, model_tables):
    """As many failures as before, but of other pictures: the captions of both are out of date."""
    from captioning.compose import compose

    records = lab.save(lab.png(64, 64), lab.png(65, 64))
    files = [(lab.pictures / row["path"], (lab.pictures / row["path"]).read_bytes()) for row in records]
    lab.keep(records)
    tiers = {"quality": {"model": "quality", "comparison": ">", "steps": [[-1.0, "scored"]]}}
    config = lab.annotate_config(
        {"quality": model_tables["quality"]}, policies={"default": {"groups": ["quality"], "tiers": tiers}}
    )
    texts = []
    for place in (0, 1):
        for path, data in files:
            path.write_bytes(data)
        files[place][0].unlink()
        part_path(lab, "quality").unlink(missing_ok=True)
        annotate(config, lab.workspace)
        compose(config, lab.workspace, policy="default")
        texts.append(lab.texts())

    assert texts == [["", "scored"], ["scored", ""]]


def test_without_models_there_is_nothing_to_do(lab):
    lab.keep([lab.record("a")])

    report = annotate(lab.config(), lab.workspace)

    assert report.summary() == "annotate: the dataset names no models, nothing to do"
    assert not (lab.workspace.root / "annotations").exists()


def test_scores_that_are_not_finite_are_no_result(lab, model_tables, monkeypatch):
    from captioning.scorers.base import score_rows
    from captioning.scorers.clip import ClipHead

    monkeypatch.setattr(ClipHead, "score", lambda self, features: score_rows([np.nan] + [0.5] * (len(features) - 1)))
    records = lab.save(lab.png(64, 64), lab.png(65, 64))
    lab.keep(records)

    report = annotate(lab.annotate_config(model_tables), lab.workspace, models=["quality"])

    assert [row["status"] for row in lab.rows("quality").values()] == ["not_finite", "ok"]
    assert report.without_result == {"not_finite": 1}


def test_neither_workers_nor_batches_nor_tasks_change_the_rows(lab, model_tables, tmp_path):
    records = lab.save(*(lab.png(60 + 7 * n, 90 - 5 * n, seed=n) for n in range(5)))
    lab.keep(records[:4], records[4:])
    config = lab.annotate_config({name: model_tables[name] for name in ("wd", "quality")})
    annotate(config, lab.workspace)
    expected, rows = digests(lab), lab.rows("wd")

    for path in lab.workspace.root.glob("annotations/*/part-*"):
        path.unlink()
    annotate(config, lab.workspace, workers=0, part_index=1, num_parts=2)
    annotate(config, lab.workspace, workers=1, part_index=0, num_parts=2)
    assert digests(lab) == expected

    for path in lab.workspace.root.glob("annotations/*/part-*"):
        path.unlink()
    values = config.model_dump(mode="json")["annotate"] | {"batch_size": 2}
    annotate(lab.config(annotate=values), lab.workspace)
    for key, row in lab.rows("wd").items():
        assert row["tag_ids"] == rows[key]["tag_ids"]
        np.testing.assert_allclose(row["tag_probs"], rows[key]["tag_probs"], atol=1e-6)


def test_the_last_batch_is_filled_up_so_that_every_call_has_one_shape(lab, model_tables, monkeypatch):
    from captioning.taggers.onnx_tagger import OnnxTagger

    shapes = []
    original = OnnxTagger.predict
    monkeypatch.setattr(
        OnnxTagger, "predict", lambda self, batch: (shapes.append(len(batch)), original(self, batch))[1]
    )
    lab.keep(lab.save(*(lab.png(60 + n, 60) for n in range(4))))

    annotate(lab.annotate_config(model_tables), lab.workspace, models=["wd"])

    assert shapes == [3, 3] and len(lab.rows("wd")) == 4


def test_a_killed_run_goes_on_and_gives_the_same_bytes(lab, model_tables, tmp_path):
    records = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(6)))
    lab.keep(*([row] for row in records))
    models = {name: model_tables[name] for name in ("wd", "date")}
    config = lab.annotate_config(models)
    annotate(config, lab.workspace)
    expected = digests(lab)
    for path in lab.workspace.root.glob("annotations/*/part-*"):
        path.unlink()
    config_path = tmp_path / "config.json"
    config_path.write_text(config.model_dump_json())
    # Dies while it writes the third part of the tagger: nothing half written may be taken for a part.
    code = f"""
import os, signal
from pathlib import Path
import pyarrow.parquet as pq
from captioning.annotate import annotate
from captioning.config import CaptioningConfig
from sharding.schema import Workspace
original = pq.write_table
def write_table(table, path, **options):
    if "wd/part-00002" in str(path):
        Path(path).write_bytes(b"PAR1 half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(table, path, **options)
pq.write_table = write_table
config = CaptioningConfig.model_validate_json(Path({str(config_path)!r}).read_text())
annotate(config, Workspace(Path({str(lab.workspace.root)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    report = annotate(config, lab.workspace)

    assert (report.num_parts_current, report.num_parts_written) == (2, 4)
    assert digests(lab) == expected


def test_what_killed_writers_left_is_removed_when_it_is_old(lab, model_tables):
    lab.keep(lab.save(lab.png(64, 64)))
    folder = lab.workspace.annotations("wd")
    folder.mkdir(parents=True)
    old, of_another_task = (folder / f"{part_name(0)}.partial-{n}" for n in range(2))
    old.write_bytes(b"PAR1")
    of_another_task.write_bytes(b"PAR1")
    os.utime(old, (0, 0))

    annotate(lab.annotate_config(model_tables), lab.workspace, models=["wd"])

    assert not old.exists() and of_another_task.exists()


def test_a_damaged_part_is_made_again(lab, model_tables):
    lab.keep(lab.save(lab.png(64, 64)))
    config = lab.annotate_config(model_tables)
    annotate(config, lab.workspace, models=["wd"])
    expected = digests(lab)
    part_path(lab, "wd").write_bytes(b"garbage")

    annotate(config, lab.workspace, models=["wd"])

    assert digests(lab) == expected


def test_a_dry_run_counts_and_writes_nothing(lab, model_tables, decodes):
    lab.keep(lab.save(lab.png(64, 64), lab.png(65, 64)))

    report = annotate(lab.annotate_config(model_tables), lab.workspace, dry_run=True)

    assert report.num_rows == {"wd": 2, "aesthetic": 2, "quality": 2, "date": 2}
    assert report.num_images == 2 and not decodes and not (lab.workspace.root / "annotations").exists()


def test_a_date_alone_needs_no_pictures(lab):
    lab.keep([lab.record("a"), lab.record("b", created_at=None)])

    report = annotate(lab.annotate_config({"date": {"kind": "date"}}), lab.workspace)

    assert report.num_decodes == 0
    assert [row["score"] for row in lab.rows("date").values()] == [2023.0, None]


def test_huge_tiny_and_transparent_pictures_pass_through_every_model(lab, model_tables):
    strips = lab.png(20_000, 1), lab.png(1, 9_000)  # their shorter side enlarged to 224, they would be 4 and 2 GB
    records = lab.save(lab.png(1, 1), lab.png(3000, 500), lab.png(40, 900, mode="RGBA"), lab.png(5, 5), *strips)
    lab.keep(records)

    report = annotate(lab.annotate_config(model_tables), lab.workspace)

    assert report.without_result == {} and report.num_decodes == 6


def test_scaled_decoding_is_another_preprocessing_with_nearly_the_same_scores(lab, model_tables):
    image = Image.open(io.BytesIO(lab.png(2000, 1500)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    (row,) = lab.save(buffer.getvalue())
    lab.keep([row])
    annotate(lab.annotate_config(model_tables), lab.workspace)
    full = {name: lab.rows(name)[row["key"]] for name in model_tables}
    tables = {"models": model_tables, "workers": 0, "min_side": 256}

    report = annotate(lab.config(annotate=tables), lab.workspace)

    assert report.num_rows == {"wd": 1, "aesthetic": 1, "quality": 1, "date": 0}
    for name in ("aesthetic", "quality"):
        assert lab.rows(name)[row["key"]]["score"] == pytest.approx(full[name]["score"], abs=0.1)
    assert part_metadata(part_path(lab, "wd"))["preprocessing"] == "wd/demo/1 min_side 256"
    with pytest.raises(ConfigError, match="min_side: 200 is below the 224 pixels that 'quality' looks at"):
        annotate(lab.config(annotate=tables | {"min_side": 200}), lab.workspace)


def test_mistakes_are_named(lab, model_tables):
    lab.keep(lab.save(lab.png(64, 64)))
    with pytest.raises(ConfigError, match="model 'nope': unknown"):
        annotate(lab.annotate_config(model_tables), lab.workspace, models=["nope"])
    with pytest.raises(ModelError, match=r"annotate\.models\.wd: model = 'a/b/c': no such folder"):
        annotate(lab.annotate_config({"wd": {"kind": "wd_tagger", "model": "a/b/c"}}), lab.workspace)
    with pytest.raises(ModelError, match="CUDAExecutionProvider"):
        tables = {"models": {"wd": model_tables["wd"]}, "device": "cuda", "workers": 0}
        annotate(lab.config(annotate=tables), lab.workspace)
    with pytest.raises(ConfigError, match=r"annotate\.models\.wd: kind 'florence': unknown; known: wd_tagger"):
        lab.annotate_config({"wd": {"kind": "florence", "model": "x"}})


def test_a_missing_runtime_says_which_extra_to_install(lab, model_tables, monkeypatch):
    lab.keep(lab.save(lab.png(64, 64)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(ModelError, match=r"pip install -e '\.\[caption,cpu\]'"):
        annotate(lab.annotate_config(model_tables), lab.workspace)


class Stumble:
    """A preparer with a mistake in it."""

    min_side = 1

    def prepare(self, image):
        raise IndexError("out of bounds")


def test_a_mistake_in_a_preparer_names_the_picture_that_shows_it(lab):
    (record,) = lab.save(lab.png(64, 64))
    task = ImageTask(record["key"], lab.pictures / record["path"], record["num_bytes"], {"x": Stumble()})

    with Decoders(1, batch_size=1) as decoders, pytest.raises(IndexError) as caught:
        list(decoders.in_order([(0, task)]))

    assert caught.value.__notes__ == [f"while preparing {task.key} {task.path}"]


class OutOfMemory:
    """A preparer that needs more memory than there is."""

    min_side = 1

    def prepare(self, image):
        raise MemoryError


def test_a_picture_too_large_to_prepare_has_no_result_and_stops_nothing(lab):
    (record,) = lab.save(lab.png(64, 48))
    task = ImageTask(record["key"], lab.pictures / record["path"], record["num_bytes"], {"x": OutOfMemory()})

    prepared = decode.prepare_image(task)

    assert (prepared.status, prepared.detail) == ("out_of_memory", "preparing 64x48 pixels")


class KillTheWorker:
    """A preparer that takes its process down, as the kernel does when memory runs out, at pictures of one width."""

    min_side = 1

    def __init__(self, width):
        self.width = width

    def prepare(self, image):
        if image.width == self.width:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array(image)


def tasks_of(lab, records, preparer):
    return [ImageTask(it["key"], lab.pictures / it["path"], it["num_bytes"], {"x": preparer}) for it in records]


def test_a_picture_that_kills_its_worker_costs_only_itself(lab, caplog):
    records = lab.save(*(lab.png(8 + n, 8) for n in range(6)))
    items = list(enumerate(tasks_of(lab, records, KillTheWorker(10))))
    items.insert(3, ("end of a part", None))

    with Decoders(1, batch_size=1) as decoders:
        answers = list(decoders.in_order(items))

    assert [companion for companion, _ in answers] == [0, 1, 2, "end of a part", 3, 4, 5]
    statuses = [prepared.status if prepared else None for _, prepared in answers]
    assert statuses == ["ok", "ok", "worker_died", None, "ok", "ok", "ok"]
    assert "a decode worker died" in caplog.text


def test_workers_that_die_whatever_they_are_given_end_the_run_and_never_hang(lab, monkeypatch):
    monkeypatch.setattr(decode, "_MOST_DEATHS", 2)  # each one is a process that starts
    records = lab.save(*(lab.png(8, 8 + n) for n in range(3)))
    first = ", ".join(it["key"] for it in records[:2])

    with Decoders(1, batch_size=1) as decoders, pytest.raises(WorkerDiedError, match=f"at the images {first}, one"):
        list(decoders.in_order(enumerate(tasks_of(lab, records, KillTheWorker(8)))))


class Slow:
    """A preparer that takes its time."""

    min_side = 1

    def prepare(self, image):
        time.sleep(60)


def test_who_is_stopped_does_not_wait_for_a_slow_picture(lab):
    with pytest.raises(KeyboardInterrupt), Decoders(1, batch_size=1) as decoders:
        stream = decoders.in_order([(0, None), *enumerate(tasks_of(lab, lab.save(lab.png(8, 8)), Slow()))])
        next(stream)
        started = time.monotonic()
        raise KeyboardInterrupt

    assert time.monotonic() - started < 10


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = """
import time, os
from captioning.decode import Decoders, ImageTask
from pathlib import Path
if __name__ == "__main__":
    decoders = Decoders(1, batch_size=1)
    list(decoders.in_order([(0, ImageTask("k", Path("absent"), 1, {}))]))
    print(*[process.pid for process in decoders._pool._processes.values()], flush=True)
    time.sleep(60)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())

    parent.kill()
    parent.wait()

    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_answers_come_in_order_and_at_most_a_window_is_in_flight(lab):
    records = lab.save(*(lab.png(8 + n, 8) for n in range(12)))
    taken = []

    def items():
        for number, row in enumerate(records):
            taken.append(number)
            yield number, ImageTask(row["key"], lab.pictures / row["path"], row["num_bytes"], {})

    with Decoders(0, batch_size=1) as decoders:
        for done, (number, prepared) in enumerate(decoders.in_order(items())):
            assert number == done and prepared is not None and prepared.status == "ok"
            assert len(taken) <= done + decoders.window
    assert decode.Decoders(0, batch_size=1).window == 4


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
