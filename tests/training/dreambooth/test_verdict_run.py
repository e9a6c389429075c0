"""The verdict in runs of toy models: what is measured when, on what, and what a resumed run says."""

import io
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image

from sharding.chunk import Sample, commit_chunk, open_chunk, write_shard
from sharding.schema import Workspace
from tests.training.dreambooth.test_verdict import dreambooth_config
from tests.training.dreambooth.toy_sd import toy_text, toy_unet
from tests.training.test_state import save
from tests.training.test_validation import FixedRecipe, Ranks
from tests.training.toy import toy_config
from training.cli import main
from training.dreambooth.verdict import watch
from training.dreambooth.verdict.best import best_state, epochs_until, keep_best, saved_states
from training.dreambooth.verdict.limits import builtin_limits
from training.dreambooth.verdict.losses import VerdictLosses
from training.dreambooth.verdict.report import read_verdict
from training.metrics_file import read_metrics
from training.records import Records
from training.retention import retain_exports
from training.run_dir import RunDir
from training.state_manifest import StateError

RUN = """
name = "tiny"
device = "cpu"
[data]
workspace = "{workspace}"
chunks = ["concepts/0*"]
workers = 0
epochs = 2
[batch]
batch_size = 4
micro_batch_size = 2
[buckets]
resolution = [64, 64]
step = 32
min_side = 32
[optimizer]
learning_rate = 1e-3
[schedule]
name = "constant"
[precision]
autocast = "no"
[save]
every_steps = 2
keep_states = 1
export_every_chunks = 0
[trackers]
tensorboard = false
[preview]
every_steps = 2
[[preview.prompts]]
text = "rin, standing"
width = 64
height = 64
steps = 2
sampler = "ddim"
[dreambooth]
model = "{model}"
sanity_prompt = "a castle"
"""
HELD_OUT = "concepts/held-out"
NEAREST, DRIFT = "verdict/nearest/rin", "verdict/sanity_drift"


def painting(seed, size):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def make_chunk(workspace, name, concepts, *, first_key, is_held_out=False):
    """Pictures of `concepts`, {name: how many}, in one shard."""
    folder = Workspace(workspace).chunks / name
    samples, names = [], [concept for concept, count in concepts.items() for _ in range(count)]
    for number, concept in enumerate(names, first_key):
        key = f"{number:016x}"
        size = (64, 64) if number % 3 else (96, 64)
        row = {
            "width": size[0], "height": size[1], "groups": None, "period": "mid", "repeats": 1, "loss_weight": 1.0,
            "dataset": concept.split("/")[0],
        }  # fmt: skip
        samples.append(Sample(key, f"{key}.png", painting(number, size), {"key": key}, f"{concept}, smile", row))
    shard, rows = write_shard(folder, 0, samples)
    table = pa.Table.from_pylist([dict(row) for row in rows])
    is_class = [name.endswith("/class") for name in names]
    table = table.append_column("concept", pa.array(names))
    table = table.append_column("every_epochs", pa.array([2 if one else 1 for one in is_class], pa.int32()))
    table = table.append_column("epoch_offset", pa.array([int(one) for one in is_class], pa.int32()))
    facts = {"policy": "p", "shard_policy": "p", "made_from": "test", "seed": 0}
    commit_chunk(folder, table, name=name, shards=[shard], is_held_out=is_held_out, **facts)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=4, **blocks)  # 64 pixels are 8, as in full size
    parts = {"unet": toy_unet("sd1", layers_per_block=1), "vae": vae, "text_encoder": toy_text()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


class TinyRun:
    def __init__(self, root, model, *, held_out=True):
        workspace = root / "workspace"
        make_chunk(workspace, "concepts/01-all", {"rin": 4, "aoi": 2, "aoi/class": 2}, first_key=0)
        if held_out:
            make_chunk(workspace, HELD_OUT, {"rin": 1, "aoi": 1}, first_key=100, is_held_out=True)
        self.toml = root / "run.toml"
        self.toml.write_text(RUN.format(workspace=workspace, model=model))
        self.dir = RunDir(root / "run")

    def train(self, *overrides, command="run", extra=()):
        sets = [word for one in overrides for word in ("--set", one)]
        return main([command, str(self.toml), "--run-dir", str(self.dir.root), *sets, *extra])

    def keys(self, concept):
        index = open_chunk(Workspace(self.toml.parent / "workspace").chunks / "concepts/01-all").read_index()
        return {row["key"] for row in index.to_pylist() if row["concept"] == concept}

    def rows(self):
        return {
            row["global_step"]: {key: value for key, value in row.items() if key.startswith("verdict/")}
            for row in read_metrics(self.dir.metrics_path)
            if any(key.startswith("verdict/") for key in row)
        }


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    limits = builtin_limits()
    measure = limits.measure.model_copy(update={"pictures_per_concept": 2, "timesteps": (0.2, 0.6)})
    monkeypatch.setattr(watch, "builtin_limits", lambda: limits.model_copy(update={"measure": measure}))


def test_a_run_is_measured_from_its_start_and_says_what_it_makes_of_it(tmp_path, model, capsys):
    run = TinyRun(tmp_path, model)

    assert run.train() == 0

    rows = run.rows()
    assert list(rows) == [0, 2, 4, 5]
    names = {"rin", "aoi"}
    per_concept = {f"verdict/{kind}/{name}" for kind in ("trained", "held_out", "gap") for name in names}
    assert all(set(row) == {*per_concept, "verdict/prior/aoi", NEAREST, DRIFT} for row in rows.values())
    last = rows[5]
    assert last["verdict/gap/rin"] == last["verdict/held_out/rin"] - last["verdict/trained/rin"]
    assert last["verdict/trained/rin"] < rows[0]["verdict/trained/rin"]
    assert (rows[0][DRIFT], last[DRIFT] > 0) == (0.0, True)
    assert [path.name[-13:] for path in (run.dir.root / "verdict").iterdir()] == ["-00000000.png"]
    told = read_verdict(run.dir.root)
    assert (told["global_step"], told["sanity"]) == (5, {"drift": last[DRIFT], "since_global_step": 0})
    assert {name: one["word"] != "unknown" for name, one in told["concepts"].items()} == dict.fromkeys(names, True)
    (preview,) = told["previews"]
    assert preview["concept"] == "rin" and (run.dir.root / preview["file"]).is_file()
    assert preview["nearest"]["rin"]["likeness"] == last[NEAREST]
    assert preview["nearest"]["rin"]["key"] in run.keys("rin")
    assert preview["nearest"]["aoi"]["key"] in run.keys("aoi")
    capsys.readouterr()
    run.train(command="status")
    assert "verdict at global step 5 (concepts/01-all):" in capsys.readouterr().out
    assert run.train(command="export", extra=("--best", "--output", str(tmp_path / "best"))) == 0
    assert any((tmp_path / "best").iterdir())


def test_a_run_that_was_killed_says_the_same(tmp_path, model, monkeypatch):
    straight, killed = TinyRun(tmp_path / "a", model), TinyRun(tmp_path / "b", model)
    straight.train()
    append, left = Records.measured, [1]

    def measured(records, position, values):
        if position.global_step == 4 and left.pop():
            raise OSError("killed before the verdict")
        append(records, position, values)

    monkeypatch.setattr(Records, "measured", measured)

    assert killed.train() == 1
    monkeypatch.setattr(Records, "measured", append)
    assert killed.train() == 0

    assert killed.rows() == straight.rows()
    assert read_verdict(killed.dir.root) == read_verdict(straight.dir.root)


def test_without_held_out_pictures_and_sanity_prompt_that_is_said(tmp_path, model):
    run = TinyRun(tmp_path, model, held_out=False)

    concepts = tmp_path / "concepts.toml"
    concepts.write_text("".join(f"[[concepts]]\nname = '{name}'\nfolder = 'none'\n" for name in ("rin", "aoi")))

    settings = ("dreambooth.sanity_prompt=''", f"dreambooth.concepts='{concepts}'")
    assert run.train(*settings, "preview.prompts=[]", "preview.every_steps=0") == 0

    assert {name for row in run.rows().values() for name in row} == {
        "verdict/trained/rin", "verdict/trained/aoi", "verdict/prior/aoi",
    }  # fmt: skip
    assert len(read_verdict(run.dir.root)["concepts"]["rin"]["unknown"]) == 3


# --- what does not depend on anything else ---


def losses_of(tmp_path, world_size, *, stops=()):
    config = dreambooth_config(timestep_range=(0.1, 0.9)).model_copy(
        update={"buckets": toy_config(buckets={"resolution": [64, 64], "step": 32, "min_side": 32}).buckets}
    )
    data = config.data.model_copy(update={"workspace": tmp_path / "workspace", "workers": 0})
    config = config.model_copy(update={"data": data})
    chunk = open_chunk(Workspace(tmp_path / "workspace").chunks / "concepts/01-all")
    ranks, found = Ranks(world_size), [None] * world_size
    recipes = [FixedRecipe(dropout=0.5) for _ in range(world_size)]

    def work(number):
        engine = ranks.engine(number)
        rank = SimpleNamespace(
            config=config, engine=engine, is_main=number == 0,
            agreed_stop=lambda: next((r for r in engine.gather("asked" if number in stops else "") if r), ""),
            from_main=lambda ask: engine.gather(ask() if number == 0 else None)[0],
        )  # fmt: skip
        trained = SimpleNamespace(recipe=recipes[number], model=recipes[number].module, shown=nullcontext)
        measure = builtin_limits().measure
        found[number] = VerdictLosses(rank, chunk, measure).run(trained)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_any_number_of_ranks_gives_the_same_numbers_on_all_of_them(tmp_path):
    TinyRun(tmp_path, "none")

    (alone,), two, three = (losses_of(tmp_path, count) for count in (1, 2, 3))

    rows = [{name: value for name, value in row.items() if "seconds" not in name} for row, _ in (alone, *two, *three)]
    assert "verdict/gap/aoi" in rows[0]
    assert all(row == rows[0] for row in rows)


def test_a_stop_on_one_rank_stops_all(tmp_path):
    TinyRun(tmp_path, "none")

    assert losses_of(tmp_path, 2, stops=(1,)) == [({}, "asked"), ({}, "asked")]


# --- the state that is kept ---


def test_the_best_state_outlives_newer_ones_until_another_is_better(tmp_path):
    run_dir = RunDir(tmp_path)
    folders = [save(run_dir.state_folder("c/0", step), step, keep_last=1) for step in (1,)]
    keep_best(run_dir, folders[0])
    for step in (2, 3):
        folders.append(save(run_dir.state_folder("c/0", step), step, keep_last=1))
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert list(saved_states(run_dir)) == [1, 3]
    assert best_state(run_dir) == folders[0]

    keep_best(run_dir, folders[2])
    other = save(run_dir.state_folder("c/1", 4), 4, keep_last=1)
    save(run_dir.state_folder("c/0", 5), 5, keep_last=1)
    assert [folder.exists() for folder in folders] == [False, False, True]

    keep_best(run_dir, other)
    save(run_dir.state_folder("c/0", 6), 6, keep_last=1)
    assert [folder.exists() for folder in folders] == [False, False, False]
    assert best_state(run_dir) == other


def test_a_run_without_a_best_state_says_what_it_takes(tmp_path):
    with pytest.raises(StateError, match="no state is known to be the best"):
        best_state(RunDir(tmp_path))


def test_exports_of_the_best_chunk_stay(tmp_path):
    run_dir = RunDir(tmp_path)
    records = {}
    for number in range(3):
        name = f"c/{number}"
        run_dir.weights_folder(name).mkdir(parents=True)
        records[name] = SimpleNamespace(chunk=name, status="done", last_state=SimpleNamespace(global_step=number))
    keep_best(run_dir, run_dir.final_folder("c/0"))

    retain_exports(records, run_dir, keep_exports=1)

    assert [run_dir.weights_folder(name).exists() for name in records] == [True, False, True]


def test_epochs_are_counted_over_stages():
    def started(chunk, step, steps, epochs):
        fields = {"chunk": chunk, "global_step": step, "steps": steps, "epochs": epochs}
        return SimpleNamespace(event="started", fields=fields)

    lines = [started("a", 0, 20, 10), started("a", 8, 20, 10), started("b", 20, 30, 10)]

    assert [epochs_until(lines, step) for step in (0, 1, 2, 10, 20, 26, 50)] == [0, 1, 1, 5, 10, 12, 20]
