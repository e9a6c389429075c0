"""LoRAs merged into a model, extracted from two, and resized; through the command line where users do it."""

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from tests.training.dreambooth.toy_adapters import adapted, predict, shake, toy_networks
from tests.training.dreambooth.toy_sd import toy_vae
from training import cli
from training.dreambooth.adapters.extracting import extract_sd
from training.dreambooth.adapters.files import KOHYA_FILE, read_adapters, write_adapters
from training.dreambooth.adapters.merging import merge_sd
from training.dreambooth.adapters.names import UNET
from training.dreambooth.adapters.recognised import is_stable_diffusion
from training.dreambooth.model import SdNetworks
from training.dreambooth.sd_models.models import load_sd
from training.dreambooth.single_file.layout import Parts
from training.dreambooth.single_file.writing import write_single_file
from training.dreambooth.text import SdText
from training.lora.adapter import DOWN, UP, Adapter, AdapterError
from training.lora.layers import adaptable
from training.lora.resizing import resize_file
from training.lora.svd import reduced_change, resized


def write_model(path, family, networks):
    """Write toy networks as a single file."""
    texts = tuple(text.state_dict() for text in networks.text.texts)
    parts = Parts(unet=networks.unet.state_dict(), vae=toy_vae().state_dict(), texts=texts)
    write_single_file(path, parts, family=family)
    return path


def networks_of(path, family):
    model = load_sd(str(path))
    return SdNetworks(model.unet, SdText(family, list(model.texts)))


def moved(family, *, size=0.02):
    """Return toy networks whose every weight is another than the toy's."""
    networks = toy_networks(family)
    shake(networks, size=size)
    return networks


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- merging ---


@pytest.mark.parametrize(("family", "layout", "place"), [("sd1", "original", "model.safetensors"),
                                                         ("sdxl", "diffusers", "diffusers")])  # fmt: skip
def test_merging_a_file_gives_what_training_predicted(family, layout, place, tmp_path):
    base = write_model(tmp_path / "base.safetensors", family, toy_networks(family))
    parts = ("unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else []))
    start = networks_of(base, family)
    lora = {"rank": 3, "alpha": 2.0, "text_encoder": {"rank": 2}}
    _, model, adapters, _ = adapted(family, train=parts, lora=lora)
    model.load_state_dict({**model.state_dict(), **base_under_adapters(model, start)}, strict=False)
    shake(model)
    write_adapters(
        tmp_path, adapters.adapters(model.state_dict()), family=family, formats=["kohya"], dtype=torch.float32,
        unet_layers=adapters.adaptable_layers()[UNET], metadata={},
    )  # fmt: skip

    files = [str(base), str(tmp_path / KOHYA_FILE)]
    code = cli.main(["merge", *files, "--dtype", "fp32", "--output", str(tmp_path / "out"), "--format", layout])

    path = tmp_path / "out" / place
    torch.testing.assert_close(predict(networks_of(path, family)), predict(model), rtol=0, atol=1e-5)
    assert code == 0
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["modelspec.merged_from"] == "base.safetensors, lora.safetensors × 1"


def test_merging_at_scale_zero_gives_the_base(tmp_path):
    base = write_model(tmp_path / "base.safetensors", "sd1", toy_networks("sd1"))
    _, model, adapters, _ = adapted("sd1", lora={"rank": 2})
    shake(model)
    write_adapters(
        tmp_path, adapters.adapters(model.state_dict()), family="sd1", formats=["kohya"], dtype=torch.float32,
        unet_layers=adapters.adaptable_layers()[UNET], metadata={},
    )  # fmt: skip

    merge_sd(str(base), tmp_path / KOHYA_FILE, tmp_path / "none", scale=0.0, formats=["original"], dtype=torch.float32)

    found = load_file(tmp_path / "none" / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in load_file(base).items())


def base_under_adapters(model, start):
    """Return the base's weights under the names that they have below adapters."""
    below = {name.replace(".base_layer", ""): name for name, _ in model.named_parameters()}
    return {below[name]: tensor for name, tensor in start.state_dict().items() if name in below}


def test_merge_knows_the_recipe_by_the_weights(tmp_path, capsys):
    base = write_model(tmp_path / "base.safetensors", "sd1", toy_networks("sd1"))
    save_file({"down_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")

    code = cli.main(["merge", str(base), "x.safetensors", "--output", str(tmp_path), "--format", "combined"])

    assert is_stable_diffusion(str(base)) and not is_stable_diffusion(str(tmp_path / "other.safetensors"))
    assert not is_stable_diffusion(str(tmp_path))
    assert code == 2 and "is of the recipe dreambooth; choose from original, ckpt, diffusers" in capsys.readouterr().err


# --- singular values ---


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (6, 4, 3, 3)])
def test_no_matrix_of_the_rank_is_nearer_to_a_change(shape):
    change = noise(*shape)

    found = reduced_change(change, rank=3)

    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close(found.adapter.change(change.shape).flatten(1), best, rtol=0, atol=1e-5)
    assert found.adapter.alpha == found.adapter.rank == 3
    assert found.kept_norm == pytest.approx(float(values[:3].square().sum().sqrt()), rel=1e-5)
    torch.testing.assert_close(reduced_change(change, rank=None).adapter.change(change.shape), change)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_resized_lora_is_the_nearest_of_its_rank(kernel):
    own = Adapter("lora", {DOWN: noise(8, 12, *kernel), UP: noise(20, 8, *[1] * len(kernel), seed=1)}, 4.0)
    whole = own.change(torch.Size((20, 12, *kernel)))

    found = resized(own, rank=3, layer="x").adapter

    left, values, right = torch.linalg.svd(whole.flatten(1), full_matrices=False)
    best = ((left[:, :3] * values[:3]) @ right[:3]).reshape(whole.shape)
    torch.testing.assert_close(found.change(whole.shape), best, rtol=0, atol=1e-4)
    assert found.tensors[DOWN].shape == (3, 12, *kernel) and found.tensors[UP].shape[:2] == (20, 3)
    torch.testing.assert_close(resized(own, rank=8, layer="x").adapter.change(whole.shape), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_takes_the_smallest_rank_that_keeps_it(share):
    own = Adapter("lora", {DOWN: noise(8, 12), UP: noise(20, 8, seed=1)}, 8.0)
    values = torch.linalg.svdvals(own.change(torch.Size((20, 12))))
    kept = [float((values[:rank].square().sum() / values.square().sum()).sqrt()) for rank in range(1, 9)]

    found = resized(own, rank=None, share=share, layer="x")

    assert found.adapter.rank == 1 + next(number for number, one in enumerate(kept) if one >= share)
    assert found.kept_norm >= share * found.whole_norm
    assert resized(own, rank=2, share=share, layer="x").adapter.rank == min(2, found.adapter.rank)


def test_other_kinds_and_nothing_to_do_are_refused(tmp_path):
    doras = Adapter("dora", {DOWN: noise(2, 4), UP: noise(4, 2), "dora_scale": noise(4, 1)}, 2.0)

    with pytest.raises(AdapterError, match="x: is a dora; only a LoRA can be resized"):
        resized(doras, rank=1, layer="x")
    with pytest.raises(ValueError, match="rank None, share 1: give a rank of 1 or more, a share below 1"):
        resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=None, dtype=torch.float32)
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "peft.safetensors")
    with pytest.raises(AdapterError, match="is not of kohya's layout"):
        resize_file(tmp_path / "peft.safetensors", tmp_path / "b.safetensors", rank=2, dtype=torch.float32)


# --- extracting and resizing files ---


def test_extracting_at_full_rank_gives_back_the_difference(tmp_path):
    base = write_model(tmp_path / "base.safetensors", "sd1", toy_networks("sd1"))
    _, tuned, adapters, _ = adapted("sd1", train=("unet", "text_encoder"), lora={
        "targets": ["kohya_conv"], "rank": 8, "text_encoder": {"rank": 8}})  # fmt: skip
    shake(tuned, size=0.3)
    networks = toy_networks("sd1")
    networks.unet.load_state_dict(adapters.merged_unet())
    networks.text.texts[0].load_state_dict(adapters.merged_text(0))
    write_model(tmp_path / "tuned.safetensors", "sd1", networks)

    extracted = extract_sd(
        str(base), str(tmp_path / "tuned.safetensors"), tmp_path / "lora.safetensors", rank=None, conv_rank=2000,
        dtype=torch.float32,
    )  # fmt: skip
    assert cli.main(["merge", str(base), str(tmp_path / "lora.safetensors"), "--output", str(tmp_path / "out"),
                     "--dtype", "fp32"]) == 0  # fmt: skip

    back, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "tuned.safetensors")
    assert extracted.outside == pytest.approx(0, abs=1e-9) and extracted.layers.keys() == {"unet", "text_encoder"}
    for key, tensor in wanted.items():
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=2e-6)


def test_what_a_lora_cannot_hold_is_told(tmp_path):
    base = write_model(tmp_path / "base.safetensors", "sdxl", toy_networks("sdxl"))
    other = write_model(tmp_path / "tuned.safetensors", "sdxl", moved("sdxl"))
    before, after = load_file(base), load_file(other)
    squares = {key: float((after[key] - tensor).double().square().sum()) for key, tensor in before.items()}

    extracted = extract_sd(str(base), str(other), tmp_path / "lora.safetensors", rank=4, dtype=torch.float32)

    layers = {f"{part}.{layer}" for part, own in extracted.layers.items() for layer in own}
    held = sum(one.whole_norm**2 for own in extracted.layers.values() for one in own.values())
    assert len(layers) == 132 + 2 * 6 + 3 * 6  # of CLIP-L the last layer is not read, and the toy's is not moved
    assert extracted.outside == pytest.approx(1 - held / sum(squares.values()), abs=1e-6) and extracted.outside > 0.1
    found = read_adapters(
        tmp_path / "lora.safetensors", family="sdxl",
        layers={"unet": adaptable(toy_networks("sdxl").unet),
                **{part: adaptable(text) for part, text in zip(("text_encoder", "text_encoder_2"),
                                                               toy_networks("sdxl").text.texts, strict=True)}},
    )  # fmt: skip
    assert {adapter.rank for own in found.values() for adapter in own.values()} == {4}


def test_models_that_do_not_fit_together_are_refused(tmp_path):
    one = write_model(tmp_path / "one.safetensors", "sd1", toy_networks("sd1"))
    other = write_model(tmp_path / "other.safetensors", "sd2", toy_networks("sd2"))

    with pytest.raises(AdapterError, match=r"is sd1, .* is sd2"):
        extract_sd(str(one), str(other), tmp_path / "x.safetensors", rank=4, prediction="epsilon")
    with pytest.raises(AdapterError, match="does not differ"):
        extract_sd(str(one), str(one), tmp_path / "x.safetensors", rank=4)


def test_a_resized_file_works_in_place_of_the_old_one(tmp_path, capsys):
    _, model, adapters, _ = adapted("sdxl", lora={"rank": 6, "alpha": 3.0})
    shake(model)
    own = adapters.adapters(model.state_dict())
    metadata = {"ss_network_dim": "6", "sshs_model_hash": "0", "modelspec.title": "toy"}
    layers = adapters.adaptable_layers()
    write_adapters(
        tmp_path, own, family="sdxl", formats=["kohya"], dtype=torch.float32, unet_layers=layers[UNET],
        metadata=metadata,
    )  # fmt: skip

    code = cli.main(["resize-lora", str(tmp_path / KOHYA_FILE), "--rank", "2", "--dtype", "fp32", "--output",
                     str(tmp_path / "small.safetensors")])  # fmt: skip

    found = read_adapters(tmp_path / "small.safetensors", family="sdxl", layers=layers)
    shapes = {name: parameter.shape for name, parameter in toy_networks("sdxl").unet.named_parameters()}
    for name, adapter in own[UNET].items():
        change = adapter.change(shapes[f"{name}.weight"])
        nearest = reduced_change(change, rank=2).adapter.change(change.shape)
        torch.testing.assert_close(found[UNET][name].change(change.shape), nearest, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        header = file.metadata()
    assert code == 0 and "ranks 2 to 2" in capsys.readouterr().out
    assert (header["ss_network_dim"], header["modelspec.title"]) == ("2", "toy") and "sshs_model_hash" not in header


def test_the_commands_refuse_limits_that_are_none(tmp_path, capsys):
    output = ["--output", str(tmp_path / "x.safetensors")]

    codes = [
        cli.main(["extract-lora", "a", "b", "--rank", "0", *output]),
        cli.main(["extract-lora", "a", "b", "--output", "x.pt"]),
        cli.main(["resize-lora", "a", "--output", "x.pt"]),
    ]

    errors = capsys.readouterr().err
    assert codes == [2, 2, 2] and "--rank and --conv-rank must be 1 or more" in errors and "must end in" in errors


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_changes_of_few_or_no_dimensions_have_finite_factors(shape):
    thin = noise(shape[0], 2) @ noise(2, shape[1], seed=1)

    found = reduced_change(thin, rank=6).adapter
    nothing = reduced_change(torch.zeros(shape), rank=6, share=0.9).adapter

    torch.testing.assert_close(found.change(thin.shape), thin, rtol=0, atol=1e-5)
    assert nothing.rank == 1 and not nothing.change(thin.shape).any()
    assert all(tensor.isfinite().all() for one in (found, nothing) for tensor in one.tensors.values())
