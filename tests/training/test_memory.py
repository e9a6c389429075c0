"""The planner against the literature's bytes per parameter, and against what processes really take."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from tests.training.toy import toy_config
from training.buckets import Bucket
from training.memory.activations import measured_pass, pass_bytes
from training.memory.architecture import Pass, architecture_of, shapes_of
from training.memory.live_bytes import LiveBytes
from training.memory.planner import CARDS_GIB, Planner, strategy_of
from training.memory.report import state_bytes
from training.memory.stage_c_architecture import CLIP_BIGG, CLIP_L_PARAMETERS, StageCArchitecture
from training.memory.strategies import Strategy, catalogue, fixed_bytes, optimizer_state_bytes, update_bytes
from training.optim.one_by_one import OneByOne
from training.optimizers import make_optimizer
from training.precision import DTYPES
from training.stage_c.effnet import EffNetConfig
from training.stage_c.formats import save_stage_c
from training.stage_c.network import StageCConfig, StageCNetwork
from training.weight_files import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
TINY_TEXT = CLIP_BIGG | {
    "vocab_size": 49408, "hidden_size": 64, "projection_dim": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 1,
}  # fmt: skip
TINY = StageCArchitecture(
    StageCConfig(
        c_cond=64, c_hidden=(128, 128), num_heads=(2, 2), blocks_down=(1, 1), blocks_up=(1, 1), c_clip_text=64,
        c_clip_text_pooled=64,
    ),
    CLIPTextConfig(**TINY_TEXT),
    EffNetConfig(stem_width=2, widths=(2, 2, 2, 2, 2, 2), depths=(1, 1, 1, 1, 1, 1), head_width=8),
    train_text_encoder=False,
)  # fmt: skip

MATRICES = {f"layer{number}": (4096, 4096) for number in range(4)}
ELEMENTS = 4 * 4096 * 4096


def bytes_per_parameter(**values):
    strategy = Strategy("test", **values)
    return fixed_bytes(strategy, MATRICES, frozen_bytes=0, largest_unit_elements=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer": "adamw"}, 16),
        ({"optimizer": "adafactor"}, 8),
        ({"optimizer": "adamw8bit"}, 10),
        ({"optimizer": "adamw8bit", "weights": "bf16"}, 6),
        ({"optimizer": "adafactor", "weights": "fp16"}, 4),
        ({"optimizer": "adafactor", "weights": "bf16", "fused_backward": True}, 2),
        ({"optimizer": "adamw", "sharding": "zero1"}, 20),
        ({"optimizer": "adamw", "sharding": "zero1", "num_ranks": 8}, 9.5),
        ({"optimizer": "adamw", "sharding": "zero2", "num_ranks": 8}, 6),
        ({"optimizer": "adamw", "sharding": "zero3", "num_ranks": 8}, 2.5),
        ({"optimizer": "adamw", "sharding": "fsdp", "num_ranks": 8, "accumulates": False}, 2),
        ({"optimizer": "adamw", "sharding": "fsdp", "num_ranks": 8, "whole_gradients": False}, 2),
        ({"optimizer": "adamw", "sharding": "fsdp", "num_ranks": 8}, 5.5),
        ({"optimizer": "adamw", "sharding": "fsdp_hybrid", "num_ranks": 16, "accumulates": False}, 2),
        ({"optimizer": "adamw", "sharding": "zero2", "num_ranks": 8, "offload": "optimizer"}, 4.5),
        ({"optimizer": "adamw", "sharding": "zero3", "num_ranks": 8, "offload": "all"}, 0.5),
        ({"optimizer": "adamw", "weights": "bf16", "kahan": True}, 14),
        ({"optimizer": "lion"}, 12),
        ({"optimizer": "adafactor", "ema": "device"}, 12),
    ],
)
def test_bytes_per_parameter_are_those_of_the_literature(values, expected):
    """Weights, gradients, optimizer and copies: the seed's own settings, and Rajbhandari et al. 2020 with fp32 weights.

    DeepSpeed in fp32 keeps its parts of the weights once more. FSDP2 keeps whole gradients while it accumulates.
    """
    fixed = bytes_per_parameter(**values)

    assert (fixed.total - fixed.buffers) / ELEMENTS == pytest.approx(expected, rel=0.02)


def test_what_is_offloaded_is_in_host_memory():
    offloaded = bytes_per_parameter(optimizer="adamw", sharding="zero3", num_ranks=8, offload="all")

    assert offloaded.host / ELEMENTS == pytest.approx((4 + 8 + 4) / 8)
    assert bytes_per_parameter(ema="host").host == 4 * ELEMENTS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "sgdx"}, "'sgdx' is not one of"),
        ({"fused_backward": True, "sharding": "ddp", "num_ranks": 2}, "one process only"),
        ({"sharding": "fsdp", "offload": "optimizer"}, "offload is DeepSpeed's"),
        ({"sharding": "zero2", "offload": "all"}, "only zero3"),
    ],
)
def test_what_cannot_be_combined_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Strategy("test", **values)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_bytes_are_those_of_the_real_optimizer(name):
    shapes = [(300, 200), (64, 32, 3, 3), (70,), (1, 1, 1, 50)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    if name == "adamw":
        optimizer = torch.optim.AdamW(parameters)
    else:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(parameters, lr=1.0, scale_parameter=False, relative_step=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim
    ]

    assert optimizer_state_bytes(name, shapes) == sum(t.numel() * t.element_size() for t in tensors)


def test_the_real_architecture_has_the_published_number_of_parameters():
    config = toy_config(stage_c={"train_text_encoder": True, "gradient_checkpointing": True})

    architecture = architecture_of(config)
    shapes = shapes_of(architecture)
    trained, beside, num_frozen = shapes.trained, shapes.beside, shapes.num_frozen

    assert sum(s.numel() for s in (*trained.values(), *beside.values())) == 3_589_103_632 + 694_659_840
    assert list(beside) == ["network.clip_img_mapper.weight"]
    assert num_frozen == 20_177_488 + 20_480
    assert len(architecture.assumed) == 3 and "taken for the 3.6 B model" in architecture.assumed[0]


def test_shapes_come_from_the_header_of_the_runs_own_file(tmp_path):
    network = StageCNetwork(TINY.network)
    save_stage_c(network, tmp_path / "net.safetensors", dtype=torch.bfloat16, metadata={})
    config = toy_config(stage_c={"network": str(tmp_path / "net.safetensors")}, optimizer={"name": "adamw"})

    architecture = architecture_of(config)
    size, note = state_bytes(config)

    elements = sum(p.numel() for p in network.parameters())
    trained = elements - network.clip_img_mapper.weight.numel()
    assert architecture.network.c_hidden == (128, 128)
    assert size == 4 * elements + 8 * trained
    assert f"{elements:,} fp32 weights" in note

    half = toy_config(
        stage_c={"network": str(tmp_path / "net.safetensors")}, ema={"enabled": True},
        precision={"weights": "bf16", "rounding": "kahan"},
    )  # fmt: skip
    assert state_bytes(half)[0] == 2 * elements + (2 + 4) * trained + 8 * trained


def test_live_bytes_counts_what_is_alive_once():
    given = torch.empty(1000)

    with LiveBytes([given]) as live:
        first = given + 1
        view = first.view(10, 100)
        second = first * 2
        during = live.now
        del first, second
        after = live.now
        del view

    assert (during, after, live.now, live.peak) == (8000, 4000, 0, 8000)


SMALL_PASS = Pass(256, 256, 1, autocast=False, checkpointing=False, device="cpu")


def test_activations_grow_with_images_pixels_and_formats_as_they_should():
    plain = pass_bytes(TINY, SMALL_PASS)
    twice = measured_pass(TINY, SMALL_PASS, 2).peak

    assert plain.extra(2) == pytest.approx(twice, rel=0.02)
    assert pass_bytes(TINY, replace(SMALL_PASS, width=512)).per_image > 1.7 * plain.per_image
    no_dropout = replace(TINY, attention_dropout="none")
    assert pass_bytes(no_dropout, SMALL_PASS).per_image < plain.per_image  # probabilities are not kept
    on_gpu = replace(SMALL_PASS, device="gpu")
    assert pass_bytes(TINY, on_gpu).per_image < pass_bytes(no_dropout, SMALL_PASS).per_image  # nor dropout's factors
    assert pass_bytes(TINY, replace(on_gpu, weights="bf16")).per_image < pass_bytes(TINY, on_gpu).per_image
    assert pass_bytes(TINY, replace(on_gpu, autocast=True)).fixed > pass_bytes(TINY, on_gpu).fixed  # casts of weights


def test_checkpointing_and_released_gradients_save_what_they_should():
    deep = replace(TINY, network=replace(TINY.network, blocks_down=(3, 3), blocks_up=(3, 3)))

    whole, checkpointed = (
        pass_bytes(deep, Pass(256, 256, 1, autocast=True, checkpointing=each)) for each in (False, True)
    )

    assert checkpointed.per_image < whole.per_image / 2


def test_an_update_inside_backward_sets_the_floor():
    settings = replace(SMALL_PASS, weights="bf16", gradients="released", update_bytes=16)

    released = pass_bytes(TINY, settings)

    largest = max(shape.numel() for shape in shapes_of(TINY).trained.values())
    assert released.floor >= 16 * largest
    assert released.extra(1) == released.floor
    assert pass_bytes(TINY, replace(settings, update_bytes=0)).floor < released.floor


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_an_update_takes_what_the_real_optimizer_takes(name, weights):
    parameter = torch.nn.Parameter(torch.zeros(256, 512, dtype=DTYPES[weights]))
    optimizer = make_optimizer(name, {"all": [parameter]}, learning_rates={"all": 1e-3})
    if weights != "fp32":
        optimizer = OneByOne(optimizer, {parameter: "x"}, rounding="nearest")
    for _ in range(2):  # the first makes the state
        parameter.grad = torch.ones_like(parameter)
        state = [t for own in optimizer.state.values() for t in own.values() if isinstance(t, torch.Tensor)]
        with LiveBytes([parameter, parameter.grad, *state]) as live:
            optimizer.step()

    planned = update_bytes(Strategy("test", optimizer=name, weights=weights, device="cpu"))
    assert live.peak / parameter.numel() == pytest.approx(planned, abs=0.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
def test_weights_are_not_in_memory_twice_while_they_are_read(tmp_path):
    num_bytes = 96 << 20
    big = {f"x{number}": torch.zeros(num_bytes // 8 // 4) for number in range(8)}
    save_file(big, tmp_path / "x.safetensors")
    del big
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")

    tensors, _ = read_tensors(tmp_path / "x.safetensors", anchor=None)

    assert sum(tensor.nbytes for tensor in tensors.values()) == num_bytes
    assert resident("VmHWM") - before < 1.3 * num_bytes


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


BIGGER = replace(TINY, network=replace(TINY.network, c_hidden=(512, 512), num_heads=(8, 8)))
MEASURE = """
import json, resource, sys, torch
from training.stage_c.network import StageCConfig, StageCNetwork
from training.weight_files import write_tensors

def peak(num_images):
    # A forward and backward pass on the CPU, fp32, on latents of 16 x 16, gradients kept.
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    open("/proc/self/clear_refs", "w").write("5")
    x, r = torch.randn(num_images, 16, 16, 16), torch.rand(num_images)
    states = torch.randn(num_images, 77, 64), torch.randn(num_images, 1, 64)
    (network(x, r, *states) - x).square().mean(dim=(1, 2, 3)).sum().backward()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 - before

torch.set_num_threads(1)
values = json.loads(sys.argv[1])
network = StageCNetwork(StageCConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
peak(1)
print(peak(4), peak(12))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
def test_the_plan_is_within_a_tenth_of_what_a_real_process_takes():
    """Peak resident memory of 4 and 12 images; their difference is activations alone."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(asdict(BIGGER.network))], cwd=ROOT, capture_output=True, text=True,
        check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    four, twelve = map(int, done.stdout.split())

    planned = pass_bytes(BIGGER, replace(SMALL_PASS, width=512, height=512))

    assert 8 * planned.per_image == pytest.approx(twelve - four, rel=0.1)


def test_the_report_names_what_fits_which_card():
    planner = Planner(TINY, Bucket(256, 256), max_tokens=75)

    estimates = [planner.estimate(strategy) for strategy in catalogue(8)]

    by_name = {estimate.strategy.name: estimate for estimate in estimates}
    assert by_name["FSDP2 full, AdamW"].load_peak > by_name["FSDP2 full, AdamW"].fixed.weights * 7  # whole, then cut up
    assert by_name["fp32, AdamW"].peak(1) > by_name["bf16, Adafactor, fused backward"].peak(1)
    assert all(estimate.largest_micro_batch(CARDS_GIB[-1] << 30) == 16 for estimate in estimates)
    assert by_name["fp32, AdamW"].largest_micro_batch(1 << 29) == 0  # the allowance is more than that


def test_a_runs_strategy_is_what_its_settings_say():
    config = toy_config(
        precision={"weights": "bf16", "rounding": "kahan"}, ema={"enabled": True, "device": "cpu"},
        optimizer={"name": "lion"}, stage_c={"gradient_checkpointing": True},
    )  # fmt: skip

    strategy = strategy_of(config, num_processes=2)

    assert (strategy.weights, strategy.kahan, strategy.ema, strategy.optimizer) == ("bf16", True, "host", "lion")
    assert (strategy.sharding, strategy.num_ranks, strategy.checkpointing) == ("ddp", 2, True)
    assert (strategy.device, strategy.accumulates) == ("cpu", True)

    in_parts = toy_config(parallel={"strategy": "zero3", "offload": "optimizer_and_weights"}, device="auto")
    split = strategy_of(in_parts, num_processes=8)
    assert (split.sharding, split.offload, split.device) == ("zero3", "all", "gpu")


def test_encoders_of_what_is_made_ahead_take_no_memory():
    still = {"shuffle": False}
    plain, ahead, previews = (
        architecture_of(toy_config(caption=still, latents=latents, **more))
        for latents, more in (
            ({}, {}),
            ({"use": True, "text": True}, {}),
            ({"use": True, "text": True}, {"preview": {"prompts": [{"text": "a"}]}, "stage_c": {"previewer": "none"}}),
        )
    )

    assert (plain.has_effnet, plain.has_text) == (True, True)
    assert (ahead.has_effnet, ahead.has_text) == (False, False)
    assert (previews.has_effnet, previews.has_text) == (False, True)
    without = replace(TINY, has_effnet=False, has_text=False)
    assert shapes_of(TINY).num_frozen > 0 == shapes_of(without).num_frozen
    assert shapes_of(without).trained == shapes_of(TINY).trained
    assert 0 < pass_bytes(without, SMALL_PASS).per_image <= pass_bytes(TINY, SMALL_PASS).per_image


def test_the_image_model_is_counted_and_its_mapper_trained_where_pictures_are_shown(tmp_path):
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
        "visual_projection.weight": (4, 8),
        "x": (9,),
    }
    write_tensors(tmp_path / "clip.safetensors", {name: torch.zeros(shape) for name, shape in shapes.items()})
    shown = {"image_encoder": str(tmp_path / "clip.safetensors"), "image_embedding_fraction": 0.1}

    given, published = (
        architecture_of(toy_config(stage_c={**shown, **more})) for more in ({}, {"image_encoder": "owner/clip"})
    )

    assert (given.image_parameters, published.image_parameters) == (8 * 12 + 4 * 8, CLIP_L_PARAMETERS)
    plain, more = (shapes_of(replace(TINY, image_parameters=number)) for number in (0, 128))
    assert set(more.trained) - set(plain.trained) == set(plain.beside) == {"network.clip_img_mapper.weight"}
    assert not more.beside and more.num_frozen - plain.num_frozen == 128


def test_adapters_are_what_is_trained_and_the_base_below_is_frozen_in_its_own_format():
    whole = shapes_of(architecture_of(toy_config()))
    lora = {"rank": 4, "text_encoder": {}}

    by_format = {
        name: shapes_of(
            architecture_of(
                toy_config(
                    lora={**lora, "base_weights": name},
                    tokens={"train": [{"token": "[it]"}, {"existing": "^dog</w>$"}]},
                )
            )
        )
        for name in ("fp32", "bf16")
    }

    shapes = by_format["bf16"]
    assert (
        sum(shape.numel() for shape in shapes.trained.values())
        == 64 * 4 * (2048 * 4 + 2048 * 2) + 32 * 4 * (4 * 1280 * 2 + 2 * (1280 + 5120)) + 2 * 1280
    )
    assert shapes.num_frozen == whole.num_frozen + 3_589_103_632
    assert by_format["fp32"].frozen_bytes - shapes.frozen_bytes == 2 * (3_589_103_632 + 694_659_840)
    assert not shapes.beside
