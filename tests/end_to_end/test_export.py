"""A run's exports: each format is the state's weights, and diffusers makes of them what our own network does."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from scripts.tiny_run import Launch, TinyRun
from tests.training.stage_c.diffusers_peer import make_decoder, outputs
from tests.training.stage_c.own_cascade import assert_same, our_outputs
from training.stage_c.given_weights import load_given

pytestmark = pytest.mark.slow

FIRST = "real/0000"
SETTINGS = (
    "data.epochs=1", "preview.prompts=[]", "stage_c.train_text_encoder=true", "save.export_dtype='fp32'",
    "save.export_formats=['original', 'combined', 'diffusers']", "save.modelspec={author = 'nobody'}",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(make_run, tmp_path_factory) -> TinyRun:
    run = make_run(tmp_path_factory.mktemp("export") / "run", *SETTINGS)
    assert run.train("--chunk", FIRST) == 0, run.log.read_text()
    return run


@pytest.fixture(scope="module")
def exported(trained, tiny_models, tmp_path_factory) -> Path:
    """`training export` of the newest state, with a decoder."""
    folder = tmp_path_factory.mktemp("exported")
    make_decoder(folder / "base", tiny_models / "tokenizer", pooled_width=48)
    output = folder / "out"
    launch(trained, "export", "--decoder-from", folder / "base", "--output", output)
    return output


def launch(run: TinyRun, command: str, *arguments: object) -> None:
    assert Launch(run.arguments(command, *map(str, arguments)), run.log).wait() == 0, run.log.read_text()


def test_every_format_holds_the_weights_of_the_state(trained, exported):
    model = load_file(trained.root / "chunks" / FIRST / "final" / "model.safetensors")
    network = {key.removeprefix("network."): value for key, value in model.items() if key.startswith("network.")}
    prefix = "text.text_model."
    text = {key.removeprefix(prefix): value for key, value in model.items() if key.startswith(prefix)}

    for source in (exported, exported / "combined.safetensors", exported / "diffusers"):
        given = load_given(source)
        assert all(torch.equal(value, network[key]) for key, value in given.network.state_dict().items())
        assert all(torch.equal(value, text[key]) for key, value in given.text_model.state_dict().items())
        assert len(network) == len(given.network.state_dict()) and len(text) == len(given.text_model.state_dict())


def test_an_export_on_command_has_the_bytes_of_the_one_after_the_chunk(trained, exported):
    weights = trained.root / "chunks" / FIRST / "weights"
    names = [path.relative_to(weights) for path in sorted(weights.rglob("*")) if path.is_file()]

    differing = [str(name) for name in names if (weights / name).read_bytes() != (exported / name).read_bytes()]

    assert len(names) > 10 and differing == ["diffusers/README.md"]  # which names the copied decoder


def test_the_header_says_whose_weights_they_are(trained, exported):
    with safe_open(exported / "stage_c.safetensors", framework="pt") as file:
        metadata = file.metadata()

    saved = [line for line in trained.rows("ledger.jsonl") if line["event"] == "state_saved"][-1]
    expected = {
        "chunkline.chunk": FIRST,
        "chunkline.global_step": str(saved["fields"]["global_step"]),
        "modelspec.author": "nobody",
        "modelspec.resolution": "256x256",  # at 3/4 6x6 latents, which decode to that
        "modelspec.date": saved["time"],
        "ss_optimizer": "adamw",
        "ss_steps": str(saved["fields"]["global_step"]),
    }
    assert metadata.items() >= expected.items()


def test_diffusers_loads_it_as_published_and_gives_what_our_network_gives(exported):
    assert_same(outputs(exported), our_outputs(load_given(exported)))


def test_previews_are_drawn_from_the_export_with_the_decoder_it_holds(trained, exported, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sky --w 384 --h 256 --d 1 --s 2\n")

    launch(
        trained, "preview", "--from", exported, "--decoder", exported / "diffusers-decoder", "--prompts", prompts,
        "--output", tmp_path,
    )  # fmt: skip

    step = trained.events("chunk_done")[-1]["global_step"]
    with Image.open(tmp_path / f"step-{step:08d}-00.png") as picture:
        assert picture.size == (384, 256)


def test_a_run_starts_from_every_format(trained, exported, make_run, tmp_path):
    shutil.copytree(exported / "diffusers", tmp_path / "pipeline")
    for name, network, text in (
        ("folder", tmp_path / "pipeline", tmp_path / "pipeline"),
        ("combined", exported / "combined.safetensors", exported / "combined.safetensors"),
    ):
        run = make_run(
            tmp_path / name, *SETTINGS, "save.export_every_chunks=0", f"stage_c.network='{network}'",
            f"stage_c.text_encoder='{text}'",
        )  # fmt: skip
        assert run.train("--chunk", FIRST) == 0, run.log.read_text()
    first, second = (load_file(tmp_path / name / "chunks" / FIRST / "final" / "model.safetensors")
                     for name in ("folder", "combined"))  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first)
