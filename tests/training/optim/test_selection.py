import pytest
import torch
from torch import nn

from training.optim.selection import PatternError, freeze, matching, split_parts, undecayed


def make_module():
    module = nn.Module()
    module.network = nn.ModuleDict(
        {"down": nn.Linear(3, 2), "norm": nn.LayerNorm(2), "clip_img_mapper": nn.Linear(2, 2)}
    )
    module.text = nn.Linear(4, 2)
    return module


def names_of(module):
    return {parameter: name for name, parameter in module.named_parameters()}


def named(module, parameters):
    names = names_of(module)
    return sorted(names[parameter] for parameter in parameters)


def test_a_glob_matches_whole_names_and_a_regular_expression_any_part():
    names = ["network.down.weight", "network.down.bias", "text.weight"]

    found = matching(names, ["network.*", "weight", "re:weight$"][::2], key="k")

    assert found == {"network.*": names[:2], "re:weight$": [names[0], names[2]]}


@pytest.mark.parametrize("pattern", ["weight", "network.dwon.*", "re:^down"])
def test_a_pattern_without_a_match_is_an_error_that_shows_names(pattern):
    with pytest.raises(
        PatternError, match=r"optimizer\.freeze: '.*' matches no parameter of 8; they are named network"
    ):
        freeze(make_module(), ["text.*", pattern])


def test_a_broken_regular_expression_is_shown():
    with pytest.raises(PatternError, match=r"'re:\(' is not a regular expression"):
        matching(["a"], ["re:("], key="k")


def test_freezing_says_what_it_froze():
    module = make_module()

    frozen = freeze(module, ["text.*", "*.weight"])

    assert named(module, (p for p in module.parameters() if p.requires_grad)) == [
        "network.clip_img_mapper.bias", "network.down.bias", "network.norm.bias",
    ]  # fmt: skip
    assert (frozen.num_tensors, frozen.num_elements, frozen.num_trained_elements) == (5, 8 + 2 + 6 + 2 + 4, 6)
    assert str(frozen) == "frozen: 5 tensors, 22 elements ('text.*': 2, '*.weight': 4); 6 elements are trained"


def test_freezing_everything_is_an_error():
    with pytest.raises(PatternError, match="leaves nothing to train"):
        freeze(make_module(), ["*"])


def test_a_part_of_its_own_is_taken_out_of_the_recipes():
    module = make_module()
    module.network["norm"].requires_grad_(False)
    parts = {"network": module.network.parameters(), "text_encoder": module.text.parameters()}

    split = split_parts(parts, names_of(module), {"mapper": ["*clip_img_mapper.*"], "texts": ["text.*"]})

    assert {part: named(module, members) for part, members in split.items()} == {
        "network": ["network.down.bias", "network.down.weight"],
        "mapper": ["network.clip_img_mapper.bias", "network.clip_img_mapper.weight"],
        "texts": ["text.bias", "text.weight"],
    }


@pytest.mark.parametrize(
    "own, message",
    [
        ({"network": ["text.*"]}, "'network' is a part of the recipe"),
        ({"a": ["text.*"], "b": ["*.bias"]}, r"text\.bias is in 'a' and in 'b'"),
        ({"a": ["vae.*"]}, r"optimizer\.parts\.a: 'vae\.\*' matches no parameter"),
    ],
)
def test_parts_that_clash_are_refused(own, message):
    module = make_module()
    parts = {"network": module.network.parameters(), "text_encoder": module.text.parameters()}

    with pytest.raises(PatternError, match=message):
        split_parts(parts, names_of(module), own)


@pytest.mark.parametrize(
    "decay_vectors, expected",
    [
        (True, ["network.clip_img_mapper.weight", "text.weight"]),
        (False, ["network.clip_img_mapper.bias", "network.clip_img_mapper.weight", "network.down.bias",
                 "network.norm.bias", "network.norm.weight", "text.bias", "text.weight"]),
    ],
)  # fmt: skip
def test_vectors_patterns_and_always_the_image_mapper_do_not_decay(decay_vectors, expected):
    module = make_module()

    assert named(module, undecayed(names_of(module), ["text.weight"], decay_vectors=decay_vectors)) == expected


def test_what_does_not_decay_keeps_its_bits_under_a_zero_gradient():
    from training.optimizers import make_optimizer

    module = make_module()
    exempt = undecayed(names_of(module), [], decay_vectors=False)
    optimizer = make_optimizer(
        "adamw", {"all": module.parameters()}, learning_rates={"all": 0.1}, weight_decay=0.5, undecayed=exempt
    )
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["network.down.weight", "text.weight"]
