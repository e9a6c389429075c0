import numpy as np
import pytest
import torch

from training.optim.rounding import compensated_bf16, rounding_bits, rounding_key, stochastic_bf16


def neighbours(value):
    """The two bf16 numbers around a positive fp32 number."""
    bits = np.array([value], np.float32).view(np.uint32) & 0xFFFF0000
    below, above = (np.array([bits[0] + step], np.uint32).view(np.float32)[0] for step in (0, 0x10000))
    return float(below), float(above)


@pytest.mark.parametrize("value", [0.02, 0.02 + 1e-5, 1.0 + 1 / 512, 3.3e-39, 700.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_roundings_is_the_number(value, sign):
    number = float(np.float32(value))
    below, above = neighbours(number)
    count = 1 << 18

    rounded = stochastic_bf16(torch.full((count,), sign * number), rounding_key(0, 7, "w")).double() * sign

    share = (number - below) / (above - below)
    assert set(rounded.unique().tolist()) <= {below, above}
    error = float((rounded == above).double().mean()) - share
    assert abs(error) < 5 * (max(share * (1 - share), 1e-9) / count) ** 0.5 + 1 / 65536  # 5 standard deviations


def test_small_updates_add_up_in_the_mean():
    weights = torch.full((20_000,), 0.02).bfloat16()
    for step in range(100):
        weights = stochastic_bf16(weights.float() + 1e-6, rounding_key(3, step, "w"))

    start = float(torch.tensor(0.02).bfloat16())
    assert float(weights.double().mean()) == pytest.approx(start + 1e-4, abs=1e-6)
    assert float((torch.full((1,), 0.02).bfloat16().float() + 1e-6).bfloat16()) == start  # to nearest: never


def test_bits_are_uniform_and_independent_between_steps_names_and_neighbours():
    count = 1 << 18
    sets = [
        rounding_bits(rounding_key(*key), 0, count).double()
        for key in ((0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "b"))
    ]

    for bits in sets:
        histogram = torch.histc(bits, 256, 0, 65536)
        assert float(((histogram - count / 256) ** 2 / (count / 256)).sum()) < 255 + 5 * (2 * 255) ** 0.5
    series = [*sets, sets[0].roll(1), sets[0].roll(1024)]
    correlation = torch.corrcoef(torch.stack(series)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / count**0.5


def test_each_of_the_16_bits_is_fair():
    bits = rounding_bits(rounding_key(5, 123_456, "network.down_blocks.0.weight"), 0, 1 << 18)

    shares = [float((bits >> place & 1).double().mean()) for place in range(16)]

    assert shares == pytest.approx([0.5] * 16, abs=5 * 0.5 / 512)


def test_an_element_has_its_bits_wherever_its_piece_begins():
    key = rounding_key(0, 0, "w")
    values = torch.linspace(-1, 1, 3 << 19)

    whole = stochastic_bf16(values.view(3, -1), key)

    assert torch.equal(whole.flatten()[1000:1500], stochastic_bf16(values[1000:1500], key, first=1000))


def test_bits_are_the_same_for_ever_and_those_of_the_stated_hash():
    def mixed(number):
        for half in key:
            number ^= half % 2**32
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
                number = (number ^ (number >> shift)) * factor % 2**32
        return number & 0xFFFF

    key = rounding_key(0, 0, "w")

    bits = rounding_bits(key, 5, 1000).tolist()

    assert bits == [mixed(number) for number in range(5, 1005)]
    assert rounding_bits(key, 0, 4).tolist() == [13635, 13165, 48358, 58212]


def test_what_bf16_can_hold_and_what_is_not_finite_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, float("inf"), float("-inf"), float("nan")])

    rounded = stochastic_bf16(values.bfloat16().float(), rounding_key(0, 0, "w"))

    assert torch.equal(rounded.view(torch.int16)[:-1], values.bfloat16().view(torch.int16)[:-1])
    assert torch.isnan(rounded[-1])


def test_compensation_keeps_what_rounding_loses():
    values = torch.rand(10_000) * 2 - 1

    rounded, lost = compensated_bf16(values)

    assert torch.equal(rounded, values.bfloat16())
    assert float((rounded.float() + lost.float() - values).abs().max()) < 2**-17
