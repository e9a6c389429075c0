"""One layer's adapter against PEFT's own layers, and q, k and v together or apart."""

import pytest
import torch
from torch import nn

from training.lora.adapter import DOWN, UP, Adapter, AdapterError, adapter_of
from training.lora.layers import LayerChoice, add_adapters, chosen, taken_out
from training.lora.packing import packed, unpacked
from training.optim.selection import PatternError


def two_layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"linear": nn.Linear(12, 20), "conv": nn.Conv2d(4, 6, 3), "grouped": nn.Conv2d(4, 4, 3, groups=4)}
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("rank", [2, 64])
def test_the_merged_weight_gives_what_the_layer_with_its_adapter_gives(kind, rank):
    module = two_layers()
    layers = [LayerChoice("linear", rank, 3.0), LayerChoice("conv", rank, 1.0)]
    before = {name: layer.weight.detach().clone() for name, layer in module.items()}
    add_adapters(module, layers, kind=kind, dropout=0.0, seed=5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "base_layer" not in name and "grouped" not in name:
                parameter.add_(0.1 * noise(*parameter.shape))

    found = taken_out(module.state_dict(), layers)

    x, picture = noise(3, 12), noise(2, 4, 5, 5)
    bias, kernel_bias = module["linear"].base_layer.bias, module["conv"].base_layer.bias
    linear = nn.functional.linear(x, found["linear"].merged(before["linear"]), bias)
    conv = nn.functional.conv2d(picture, found["conv"].merged(before["conv"]), kernel_bias)
    torch.testing.assert_close(linear, module["linear"](x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv, module["conv"](picture), rtol=1e-4, atol=1e-4)
    assert found["linear"].kind == kind
    half = found["linear"].merged(before["linear"], strength=0.5)
    torch.testing.assert_close(half, (before["linear"] + found["linear"].merged(before["linear"])) / 2)


def test_adapters_start_by_their_seed_and_change_nothing():
    outputs, starts = [], []
    for seed in (1, 1, 2):
        module, x = two_layers(), noise(3, 12)
        plain = module["linear"](x)
        add_adapters(module, [LayerChoice("linear", 4, 1.0)], kind="lora", dropout=0.0, seed=seed)
        outputs.append(torch.equal(module["linear"](x), plain))
        starts.append(module["linear"].lora_A["default"].weight)

    assert outputs == [True] * 3
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_patterns_choose_layers_and_blocks_take_some_out():
    module = two_layers()

    parts = chosen(module, ["*"], rank=4, alpha=1.0, blocks=[("kernels", ["conv"], 8, 2.0)])

    assert parts == {"": [LayerChoice("linear", 4, 1.0)], "kernels": [LayerChoice("conv", 8, 2.0)]}
    with pytest.raises(PatternError, match=r"lora.targets: 'grouped' matches no layer of 2; they are named linear"):
        chosen(module, ["grouped"], rank=4, alpha=1.0)
    with pytest.raises(PatternError, match="linear is in 'a' and in 'b'"):
        chosen(module, ["*"], rank=4, alpha=1.0, blocks=[("a", ["linear"], 4, 1.0), ("b", ["lin*"], 4, 1.0)])


def test_one_adapter_for_q_k_and_v_becomes_three_and_one_again():
    whole = Adapter("lora", {DOWN: noise(4, 8), UP: noise(24, 4)}, 2.0)

    three = unpacked(whole)
    again = packed(three)

    changes = torch.cat([one.change(torch.Size((8, 8))) for one in three])
    assert torch.equal(changes, whole.change(torch.Size((24, 8))))
    assert again.alpha == whole.alpha
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_three_adapters_become_one_of_three_times_the_rank_and_three_again():
    three = [Adapter("lora", {DOWN: noise(2, 8, seed=n), UP: noise(8, 2, seed=n + 9)}, 1.0) for n in range(3)]

    whole = packed(three)
    again = unpacked(whole)

    assert whole.rank == 6
    expected = torch.cat([one.change(torch.Size((8, 8))) for one in three])
    torch.testing.assert_close(whole.change(torch.Size((24, 8))), expected)
    for ours, theirs in zip(again, three, strict=True):
        assert ours.alpha == theirs.alpha
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())


def test_tensors_of_no_kind_and_adapters_that_cannot_be_together_are_refused():
    with pytest.raises(AdapterError, match=r"layer: lora_up\.weight are not the tensors of"):
        adapter_of({UP: noise(2, 2)}, 1.0, layer="layer")
    with pytest.raises(AdapterError, match="loha of q, k and v"):
        unpacked(Adapter("loha", {}, 1.0))
    with pytest.raises(AdapterError, match="different alpha / rank"):
        packed([Adapter("lora", {DOWN: noise(2, 8, seed=n), UP: noise(8, 2)}, float(n + 1)) for n in range(3)])
    with pytest.raises(AdapterError, match=r"the weight is \(3, 3\)"):
        Adapter("lora", {DOWN: noise(2, 8), UP: noise(8, 2)}, 1.0).change(torch.Size((3, 3)))
