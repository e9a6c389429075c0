"""Exports in diffusers: the network, the prior and the published example load all keys and give what ours gives.

With the diffusers that is installed, and with that of another interpreter which CHUNKLINE_DIFFUSERS_PYTHON names (one
environment with 0.35 to 0.37 and transformers 4.57; it needs torch and safetensors besides).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.demo_models.stage_c import make_stage_c_models
from tests.training.stage_c.diffusers_peer import NEGATIVE, PROMPT, SIZE, STEPS, make_decoder, outputs
from tests.training.stage_c.own_cascade import assert_same, our_outputs
from training.config import Prompt
from training.config.saving import SaveConfig
from training.stage_c.cascade import draw_pictures, with_inference_settings
from training.stage_c.decoder_folder import VQGAN_LIBRARY
from training.stage_c.export import StageCWeights, copy_decoder_beside, export_stage_c
from training.stage_c.given_weights import load_given
from training.stage_c.model_card import read_front_matter
from training.stage_c.modelspec import modelspec

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
OTHER_PYTHON = os.environ.get("CHUNKLINE_DIFFUSERS_PYTHON")
SAVE = SaveConfig(export_formats=("original", "diffusers", "combined"), model_card={"license": "mit"})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=3)


@pytest.fixture(scope="module")
def base(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "decoder"
    make_decoder(folder, models["tokenizer"], pooled_width=48)
    return folder


@pytest.fixture(scope="module")
def given(models):
    return load_given(models["stage_c"], text_encoder=str(models["text_encoder"]))


def write_export(given, base: Path, folder: Path, *, old: bool = False) -> Path:
    weights = StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=True
    )
    decoder = copy_decoder_beside(folder, str(base), SAVE, title="tiny", old=old)
    save = SAVE.model_copy(update={"hub_decoder": str(decoder)})
    header = modelspec(title="tiny", width=256, height=256)
    export_stage_c(weights, folder, save=save, dtype=torch.float32, title="tiny", header=header)
    return folder


@pytest.fixture(scope="module")
def export(given, base, tmp_path_factory) -> Path:
    return write_export(given, base, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def theirs(export) -> dict[str, torch.Tensor]:
    return outputs(export)


def test_network_prior_and_the_published_example_run_in_the_installed_diffusers(theirs, given):
    assert_same(theirs, our_outputs(given))
    assert theirs["image"].shape == (256, 256, 3) and theirs["image"].std() > 0.01


@pytest.mark.skipif(OTHER_PYTHON is None, reason="CHUNKLINE_DIFFUSERS_PYTHON names no interpreter with diffusers 0.35")
def test_the_same_in_diffusers_of_before_0_38(given, base, tmp_path):
    export = write_export(given, base, tmp_path / "export", old=True)
    script = Path(__file__).with_name("diffusers_peer.py")

    subprocess.run([OTHER_PYTHON, script, export, tmp_path / "out.safetensors"], check=True, cwd=tmp_path)

    assert_same(load_file(tmp_path / "out.safetensors"), our_outputs(given))


def test_preview_makes_the_picture_that_the_published_example_makes(theirs, given, base):
    prompt = Prompt(text=PROMPT, negative=NEGATIVE, width=SIZE, height=SIZE, seed=6, steps=STEPS)
    prompt = with_inference_settings(prompt)

    (drawn,) = draw_pictures(given, [prompt], decoder=base, previewer=None, device=torch.device("cpu"))

    published = (theirs["image"] * 255).round().int()
    ours = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).reshape(256, 256, 3).int()
    assert (published - ours).abs().max() <= 1
    assert len(ours.unique()) > 50


class SmoothPreviewer:
    """Shows three channels of the latents, however large these are: a random network's are."""

    def to(self, _device: torch.device) -> "SmoothPreviewer":
        return self

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(latents[:, :3] / latents.std())


def test_without_a_decoder_the_previewer_draws_and_long_text_is_not_cut(given):
    device, tags = torch.device("cpu"), ", ".join(f"tag{number}" for number in range(40))
    prompts = [Prompt(text=text, width=256, height=320, steps=2, guidance=4.0) for text in (tags, f"{tags}, last")]

    first, second = draw_pictures(given, prompts, decoder=None, previewer=SmoothPreviewer(), device=device)
    (again,) = draw_pictures(given, prompts[1:], decoder=None, previewer=SmoothPreviewer(), device=device)

    assert first.size == (6, 8)
    assert first.tobytes() != second.tobytes() == again.tobytes()


def test_unset_settings_of_a_prompt_are_those_of_the_published_example():
    plain, own = (with_inference_settings(prompt) for prompt in (Prompt(text="a"), Prompt(text="a", steps=20)))

    assert (plain.steps, plain.guidance) == (40, 8.0) and (own.steps, own.guidance) == (20, 8.0)
    for wrong in (Prompt(text="a", sampler="ddim"), Prompt(text="a", encode_scale=1.0)):
        with pytest.raises(ValueError, match="one latent density only"):
            with_inference_settings(wrong)


def test_a_decoder_is_copied_byte_for_byte_and_linked_both_ways(export, base):
    copied = export / "diffusers-decoder"
    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}

    assert {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()} == files
    changed = {str(name) for name in files if (base / name).read_bytes() != (copied / name).read_bytes()}
    assert changed == {"model_index.json", "README.md"}
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (base, copied))
    assert after == {**before, "vqgan": [VQGAN_LIBRARY, "PaellaVQModel"]}
    front = read_front_matter(copied / "README.md")
    assert front == {"license": "mit", "pipeline_tag": "text-to-image", "prior": [str(export / "diffusers")]}
    assert read_front_matter(export / "diffusers" / "README.md")["decoder"] == [str(copied)]


def test_hub_ids_stand_in_the_front_matter_when_given(given, base, tmp_path):
    save = SaveConfig(export_formats=("diffusers",), hub_prior="me/prior", hub_decoder="me/decoder")
    weights = StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=False
    )

    copy_decoder_beside(tmp_path, str(base), save, title="t", old=True)
    export_stage_c(weights, tmp_path, save=save, dtype=torch.float16, title="t", header={"chunkline.chunk": "a/0001"})

    assert read_front_matter(tmp_path / "diffusers-decoder" / "README.md")["prior"] == ["me/prior"]
    readme = (tmp_path / "diffusers" / "README.md").read_text()
    assert "decoder:\n- me/decoder\n" in readme and "- chunk: a/0001\n" in readme and '"me/decoder", torch' in readme


def test_what_is_no_decoder_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")

    for decoder, message in (
        (tmp_path / "none", "no such folder"),
        (broken, "not a decoder pipeline, decoder and vqgan and scheduler missing"),
        ("nobody/nothing-of-this-name", "neither a local folder nor a reachable hub id"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            copy_decoder_beside(tmp_path / "out", str(decoder), SAVE, title="t", old=False)
    for name in ("decoder", "vqgan", "scheduler"):
        (broken / name).mkdir()
    with pytest.raises(ValueError, match="has no PaellaVQModel as vqgan"):
        copy_decoder_beside(tmp_path / "out", str(broken), SAVE, title="t", old=False)
    with pytest.raises(ValueError, match="is the decoder to copy from"):
        copy_decoder_beside(
            base.parent, str(base.rename(base.with_name("diffusers-decoder"))), SAVE, title="t", old=False
        )


def test_a_prior_folder_without_index_was_cut_short(given, tmp_path, monkeypatch):
    weights = StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=False
    )
    save = SaveConfig(export_formats=("diffusers",))

    def export() -> None:
        export_stage_c(weights, tmp_path, save=save, dtype=torch.float32, title="t", header={})

    export()
    monkeypatch.setattr("training.stage_c.prior_folder.write_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export()

    assert not (tmp_path / "diffusers" / "model_index.json").exists()
