"""Runs of several stages on toy models: killed inside each, on two processes, and from latents encoded ahead."""

import gc
import weakref

import pytest
import torch

from tests.training.dreambooth.test_verdict_run import few_measurements  # noqa: F401
from tests.training.dreambooth.tiny_sd_run import SdRun
from tests.training.dreambooth.toy_recipe import save_model
from training import session
from training.records import Records

STAGES = """
prior_weight = 0.5
freeze_clip_norms = true
[[dreambooth.stages]]
name = "both"
epochs = 1
train = ["unet", "text_encoder"]
learning_rate = 2e-3
[[dreambooth.stages]]
name = "unet"
epochs = 1
train = ["unet"]
prior_weight = 0.1
[[dreambooth.stages]]
name = "back"
epochs = 1
train = ["unet", "text_encoder"]
optimizer = "{optimizer}"
"""
NAMES = ("both", "unet", "back")
EMA = "ema.enabled=true"
ALL = ("--chunks", "0:2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory):
    """A run in one piece; with the networks that were alive whenever others were loaded."""
    run = SdRun(tmp_path_factory.mktemp("straight"), models["sd1"], STAGES.format(optimizer="keep"), stages=NAMES)
    run.overrides.append(EMA)
    made, alive, load = [], [], session.load_trained

    def watched(config, engine):
        gc.collect()
        alive.append([one for one in made if one() is not None])
        trained = load(config, engine)
        made.append(weakref.ref(trained.recipe.trainable()))
        return trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_trained", watched)
        assert run.here("run", *ALL) == 0
    return run, alive


def test_a_stages_networks_are_gone_before_the_next_ones_are_loaded(straight):
    assert straight[1] == [[], [], []]


def test_a_resting_part_stays_as_it_is_and_its_moments_go(straight):
    run, _ = straight
    weights = [run.final(f"concepts/0{number}-{name}", "model") for number, name in enumerate(NAMES, 1)]
    moments = [run.final(f"concepts/0{number}-{name}", "optimizer") for number, name in enumerate(NAMES, 1)]

    def parts(tensors):
        return {"text" if "text." in name else "unet" for name in tensors}

    assert [parts(one) for one in weights] == [{"unet", "text"}] * 3
    assert [parts(one) for one in moments] == [{"unet", "text"}, {"unet"}, {"unet", "text"}]
    changed = [{name for name in one if not torch.equal(one[name], weights[0][name])} for one in weights]
    assert parts(changed[1]) == {"unet"} and parts(changed[2]) == {"unet", "text"}
    assert not any("layer_norm" in name for name in changed[2] if name.startswith("text."))
    averages = [run.final(f"concepts/0{number}-{name}", "ema") for number, name in enumerate(NAMES, 1)]
    assert set(averages[0]) == set(averages[1]) == set(averages[2])
    rates = [next(iter(one["rates"].values())) for one in run.rows("trace.jsonl")]
    assert rates[0] == 2e-3 and rates[-1] == 1e-3


def test_a_run_killed_inside_each_stage_has_the_bits_of_one_in_one_piece(straight, models, tmp_path, monkeypatch):
    whole, _ = straight
    run = SdRun(tmp_path, models["sd1"], STAGES.format(optimizer="keep"), stages=NAMES)
    run.overrides.append(EMA)
    num_steps = len(whole.losses())
    kills = [2, num_steps // 2 + 1, num_steps]
    step_done = Records.step_done

    def killed(records, report, spike):
        if kills and report.after.global_step == kills[0]:
            kills.pop(0)
            raise OSError("killed")
        return step_done(records, report, spike)

    monkeypatch.setattr(Records, "step_done", killed)
    codes = [run.here() for _ in range(6)]

    assert codes == [1, 0, 1, 0, 1, 0]
    assert run.losses() == whole.losses()
    for component in ("model", "optimizer", "ema"):
        one, other = (each.final("concepts/03-back", component) for each in (run, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_have_the_losses_of_one_across_stages(straight, models, tmp_path):
    whole, _ = straight
    run = SdRun(tmp_path, models["sd1"], STAGES.format(optimizer="keep"), stages=NAMES)
    run.overrides.append(EMA)

    assert run.train_on(2, "--chunks", "0:1") == [0, 0], run.root.with_name("run.0.log").read_text()

    losses = run.losses()
    assert losses == pytest.approx(whole.losses()[: len(losses)], rel=1e-4) and len(losses) >= 4


def test_a_fresh_optimizer_trains_otherwise_from_its_stage_on(straight, models, tmp_path):
    whole, _ = straight
    run = SdRun(tmp_path, models["sd1"], STAGES.format(optimizer="fresh"), stages=NAMES)
    run.overrides.append(EMA)

    assert run.here("run", *ALL) == 0

    one, other = (each.final("concepts/03-back", "model") for each in (run, whole))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    before = [each.final("concepts/02-unet", "model") for each in (run, whole)]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in before[0].items())


def test_an_export_holds_the_average_and_what_an_earlier_stage_trained(straight, models):
    run, _ = straight
    run.overrides = [EMA, "save.export_formats=['diffusers']", "save.export_dtype='fp32'"]

    assert run.here("export", "--output", str(run.root.parent / "exported")) == 0

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    (folder,) = [path.parent for path in (run.root.parent / "exported").rglob("model_index.json")]
    ema, model = (run.final("concepts/03-back", component) for component in ("ema", "model"))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    assert all(torch.equal(tensor, ema[f"unet.{name}"]) for name, tensor in unet.items())
    assert not all(torch.equal(tensor, model[f"unet.{name}"]) for name, tensor in unet.items())
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").state_dict()
    start = CLIPTextModel.from_pretrained(models["sd1"], subfolder="text_encoder").state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in text.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_and_text_outputs_made_ahead_give_the_losses_of_pixels(models, tmp_path, family):
    ahead = ["latents.use=true", "latents.text=true", "latents.dtype='fp32'"]
    settings = ["caption.shuffle=false", "data.epochs=2"]
    pixels, latents = (SdRun(tmp_path / kind, models[family], "", stages=("all",)) for kind in ("pixels", "latents"))
    pixels.overrides += settings
    latents.overrides += settings + ahead

    assert pixels.here() == 0
    assert latents.here("encode-latents") == 0
    assert latents.here() == 0

    assert pixels.traced() == latents.traced()
    assert len(pixels.traced()) == 10 and all(loss > 0 for *_, loss in pixels.traced())
