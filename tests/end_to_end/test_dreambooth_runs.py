"""Staged DreamBooth runs of toy models on real pictures, whole and as LoRA: killed and gone on, exported, drawn.

Two concepts, class images made by the model, two stages, previews. The networks are random: what they learn is in
`test_dreambooth_learns.py`.
"""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.tiny_dreambooth import CONCEPTS, TWO_STAGES, make_run, make_sd
from scripts.tiny_run import Launch, TinyRun
from sharding.config import load_config
from training.cli import main
from training.config import RunConfig
from training.verify_run import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIRST, SECOND = "concepts/01-with-text", "concepts/02-unet-only"
BOTH_TEXTS = tuple(one.replace('"text_encoder"]', '"text_encoder", "text_encoder_2"]') for one in TWO_STAGES)
LORA = (
    "lora={rank=4, alpha=2, base_weights='fp32', text_encoder={}, formats=['kohya', 'diffusers', 'merged']}",
    "tokens={train=[{token='<ada>', initialise='^picture</w>'}]}",
    *BOTH_TEXTS,
)
KINDS = {"sd1": ("sd1", TWO_STAGES), "sdxl": ("sdxl", BOTH_TEXTS), "lora": ("sdxl", LORA)}
"""Family, and settings of the run."""
LORA_FILES = {"kohya": "lora.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
FORMATS = "save.export_formats=['original', 'diffusers']"


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory):
    """A packed workspace, and a run on it that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        root = tmp_path_factory.mktemp(kind)
        family, overrides = KINDS[kind]
        run = make_run(root, make_sd(root / "model", family), *overrides, FORMATS, num_pictures=4)
        if kind == "lora":
            file = root / "concepts.toml"
            words = file.read_text().replace('token = "ada"', 'token = "<ada>"')
            file.write_text(words.replace('prompt = "ada"', 'prompt = "<ada>"'))
        settings = [word for override in run.overrides for word in ("--set", override)]
        assert Launch(["pack-concepts", str(run.config), *settings], run.log).wait() == 0, run.log.read_text()
        assert run.train("--chunks", ":") == 0, run.log.read_text()
        yield run


# --- killed and gone on ---


def places(run):
    return [(row["chunk"], row["global_step"]) for row in run.rows("metrics.jsonl")]


def test_a_run_killed_in_both_stages_and_between_them_ends_with_the_same_bits(whole, tmp_path):
    run = TinyRun(tmp_path / "run", whole.overrides, config=whole.config)
    in_first = sum(row["chunk"] == FIRST for row in whole.rows("metrics.jsonl"))
    moments = [
        lambda: run.last_step() >= 2,
        lambda: (run.root / "chunks" / FIRST / "final" / "manifest.json").exists(),
        lambda: run.last_step() >= in_first + 2,
    ]

    codes = [run.launch("--chunks", ":").kill_when(moment) for moment in moments]
    codes.append(run.train("--chunks", ":"))

    assert codes == [-signal.SIGKILL] * 3 + [0], run.log.read_text()
    assert run.rows("trace.jsonl") == whole.rows("trace.jsonl")
    assert places(run) == places(whole)
    for chunk in (FIRST, SECOND):
        assert run.final_files(chunk) == whole.final_files(chunk), f"weights of {chunk} differ"
    assert_proved(run)


def assert_proved(run):
    proof = verify_run(load_config(run.root / "run.toml", RunConfig, []), run.root)
    assert (proof.problems, proof.skipped, proof.broken, proof.left) == ([], [], [], 0)
    assert proof.planned == proof.trained > 0
    assert proof.num_traced_steps > 0


def test_every_showing_is_proved_and_a_stage_shows_what_it_says(whole):
    rows = whole.rows("trace.jsonl")

    assert_proved(whole)
    shown = {chunk: sum(len(row["samples"]) for row in rows if row["chunk"] == chunk) for chunk in (FIRST, SECOND)}
    num_images = len(CONCEPTS) * 4 * 2  # one class image beside each picture
    assert shown == {FIRST: 3 * num_images, SECOND: 4 * num_images}


def test_the_second_stage_leaves_text_as_the_first_left_it(whole, kind):
    from safetensors.torch import load_file

    first, second = (
        load_file(whole.root / "chunks" / chunk / "final" / "model.safetensors") for chunk in (FIRST, SECOND)
    )
    changed = {name for name in first if not first[name].equal(second[name])}
    tokens = {name for name in changed if name.endswith("token_embedding.change")}  # trained in every stage

    assert (tokens != set()) == (kind == "lora")
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in changed - tokens} == {"unet"}


# --- exported and drawn ---


def previews(run):
    """The last previews with their prompts: seed 5, guidance 1, six steps of DDIM, as scripts.tiny_dreambooth says."""
    folder = run.root / "chunks" / SECOND / "previews"
    last = max(path.name[:13] for path in folder.glob("step-*.png"))
    found = [Image.open(path) for path in sorted(folder.glob(f"{last}-[0-9][0-9].png"))]
    return {picture.info["parameters"].partition("\n")[0]: np.asarray(picture, dtype=int) for picture in found}


def base_pipeline(model, exported):
    """SDXL before it was trained; the folder `exported` says which classes, and has the tokenizers."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = {
        "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection
    }  # fmt: skip
    untrained = {name: kind.from_pretrained(model / name) for name, kind in parts.items()}
    return StableDiffusionXLPipeline.from_pretrained(exported, local_files_only=True, **untrained)


def pipelines(family):
    import diffusers

    return diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline


def drawn(pipeline, text):
    """The same picture as a preview of a concept, drawn by diffusers."""
    import torch
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    made = pipeline(text, width=64, height=64, num_inference_steps=6, guidance_scale=1.0, generator=generator)
    return np.asarray(made.images[0], dtype=int)


def assert_same_pictures(run, pipeline, texts=("ada", "bob")):
    own = previews(run)
    for text in texts:
        assert np.abs(drawn(pipeline, text) - own[text]).max() <= 1, text


def test_what_is_exported_draws_the_runs_own_previews_in_diffusers(whole, kind):
    weights, cls = whole.root / "chunks" / SECOND / "weights", pipelines(KINDS[kind][0])

    folder = cls.from_pretrained(weights / "diffusers", local_files_only=True)
    file = cls.from_single_file(
        str(weights / "model.safetensors"), config=str(weights / "diffusers"), local_files_only=True
    )

    texts = ("bob",) if kind == "lora" else ("ada", "bob")  # merged weights have no row for a new token
    assert_same_pictures(whole, folder, texts)
    assert_same_pictures(whole, file, texts)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_with_a_new_token_draws_the_runs_own_previews_in_diffusers(whole, kind, layout):
    if kind != "lora":
        pytest.skip("whole weights are loaded above")
    from safetensors.torch import load_file

    weights = whole.root / "chunks" / SECOND / "weights"
    pipeline = base_pipeline(whole.config.parent / "model", weights / "diffusers")

    pipeline.load_lora_weights(str(weights), weight_name=LORA_FILES[layout])
    token = load_file(weights / "tokens" / "ada.safetensors")
    for name, text, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer), ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2)
    ):  # fmt: skip
        pipeline.load_textual_inversion(token[name], token="<ada>", text_encoder=text, tokenizer=tokenizer)

    assert_same_pictures(whole, pipeline, ("<ada>", "bob"))


def test_preview_and_export_commands_give_what_the_run_wrote(whole, tmp_path):
    assert main(["preview", "--run-dir", str(whole.root), "--output", str(tmp_path / "drawn")]) == 0
    assert main(["export", "--run-dir", str(whole.root), "--output", str(tmp_path / "out")]) == 0

    own = previews(whole)
    made = [Image.open(path) for path in (tmp_path / "drawn").glob("step-*-[0-9][0-9].png")]
    again = {picture.info["parameters"].partition("\n")[0]: np.asarray(picture, dtype=int) for picture in made}
    assert again.keys() <= own.keys() and "bob" in again
    assert all(np.array_equal(again[text], own[text]) for text in again)
    written = tensors(whole.root / "chunks" / SECOND / "weights")
    assert tensors(tmp_path / "out") == written != {}


def tensors(folder: Path):
    """Digests of the tensors in each weights file, by its name."""
    from safetensors.torch import load_file

    from training.tensor_file import digest_of_tensors

    return {str(path.relative_to(folder)): digest_of_tensors(load_file(path)) for path in folder.rglob("*.safetensors")}


def test_status_tells_stages_concepts_and_a_verdict(whole, capsys):
    assert main(["status", "--run-dir", str(whole.root), "--json"]) == 0

    told = json.dumps(json.loads(capsys.readouterr().out))
    assert all(word in told for word in (FIRST, SECOND, *CONCEPTS))
