import math
from dataclasses import replace

import pytest

from tests.training.toy import run_toy, toy_config, toy_plan
from training.gauges import Gauges, Progress, memory_metrics
from training.loss_window import LossWindow
from training.position import Position
from training.recipes.base import SampleResult
from training.spikes import SpikeWatch
from training.step_report import StepReport
from training.timestep_bands import NUM_BANDS, band_name, band_of, centre, mean_by_band


def noisy(count):
    return [1.0 + 0.1 * math.sin(number * 1.7) for number in range(count)]


def test_a_loss_far_above_the_others_is_a_spike_and_a_low_one_is_none():
    window = LossWindow(noisy(50))

    assert window.spike_size(5.0) > 20
    assert window.spike_size(1.1) < 3
    assert window.spike_size(0.0) < 0


def test_few_losses_and_losses_that_are_no_numbers_judge_nothing():
    assert LossWindow(noisy(19)).spike_size(9.0) == 0
    assert LossWindow(noisy(50)).spike_size(math.nan) == 0
    assert math.isnan(LossWindow([math.inf]).mean)


def test_equal_losses_do_not_make_a_tiny_change_a_spike():
    assert LossWindow([1.0] * 50).spike_size(1.005) < 8


def test_a_lasting_change_is_a_spike_for_about_half_a_window():
    window, spikes = LossWindow(noisy(100)), 0
    for loss in noisy(100):
        spikes += window.spike_size(loss + 3) >= 8
        window.add(loss + 3)

    assert 30 < spikes < 70


def report(loss, *, num_results=6, step=0):
    config = toy_config()
    results = [
        SampleResult(sample.key, "d", "", loss, loss, {"timestep": 0.05 + 0.1 * number})
        for number, sample in enumerate(s for m in toy_plan(config).steps[0].micro_batches for s in m.samples)
    ]
    position = Position(chunk="toy/0000", step=step)
    after = position.after_step(num_images=6, num_broken=0, is_applied=True, seconds=3.0)
    return StepReport(toy_plan(config).steps[0], position, after, results[:num_results], [], "", {}, 1.0, 3.0, 0.0)


def test_the_log_line_has_the_rate_of_what_is_trained():
    plan, one = toy_plan(toy_config()), report(1.0)

    assert "lr 1.0e-05" in replace(one, rates={"network": 1e-5, "tokens": 5e-4}).log_line(plan)
    assert "lr 5.0e-04" in replace(one, rates={"tokens": 5e-4}).log_line(plan)


def rows(losses):
    return [{"global_step": n, "train/loss": loss, "train/weighted_loss": loss} for n, loss in enumerate(losses)]


def watch(**changes):
    return SpikeWatch(**{"factor": 8.0, "batch_size": 6, "losses": noisy(40)} | changes)


def test_a_spike_is_told_from_those_that_go_on_with_it():
    spikes = watch()

    found = [spikes.take(report(loss)) for loss in (1.0, 9.0, 9.0, 1.0)]

    assert [spike is not None for spike in found] == [False, True, True, False]
    assert (found[1].is_first, found[2].is_first) == (True, False)
    assert "weighted loss 9.0000, the median of the last 100 steps is 1.0" in str(found[1])


def test_a_short_step_a_factor_of_zero_and_a_step_without_images_give_no_spike():
    assert watch().take(report(9.0, num_results=2)) is None
    assert watch(factor=0.0).take(report(9.0)) is None
    assert watch().take(report(9.0, num_results=0)) is None


def test_spikes_are_judged_over_launches_as_in_one():
    gauges = Gauges()
    gauges.go_on_after(rows(noisy(150)))
    straight, resumed = watch(losses=noisy(150)), watch(losses=gauges.weighted_losses)

    sizes = [spikes.take(report(9.0)).size for spikes in (straight, resumed)]

    assert sizes[0] == sizes[1]


def test_a_row_says_whether_its_step_was_a_spike():
    one = report(9.0)

    found = [Gauges().read(one, one.metrics(), is_spike=is_spike)["train/spike"] for is_spike in (False, True)]

    assert found == [0, 1]


def test_a_rollback_needs_spikes_to_be_judged():
    with pytest.raises(ValueError, match="no loss is judged"):
        toy_config(trackers={"spike_factor": 0, "on_spike": "rollback"})


def test_the_average_goes_on_over_launches():
    straight, resumed = Gauges(), Gauges()
    written = []
    for loss in noisy(150):
        one = report(loss)
        written.append(one.metrics() | straight.read(one, one.metrics()))
    resumed.go_on_after(written[:-1])

    one = report(noisy(150)[-1])
    assert resumed.read(one, one.metrics())["train/loss_average"] == written[-1]["train/loss_average"]


def test_progress_and_time_left_count_what_is_done_everywhere():
    position = Position(
        chunk="b", chunk_images_trained=30, chunk_images_skipped=8, chunk_images_broken=2, chunk_busy_seconds=60.0
    )
    progress = Progress(planned=80, before=100, after=220, busy_seconds_before=220.0)

    assert progress.metrics(position) == {
        "progress/chunk_fraction": 0.5,
        "progress/campaign_fraction": 140 / 400,
        "progress/campaign_left_hours": 260 * 2.0 / 3600,
    }


def test_memory_is_measured():
    assert memory_metrics()["memory/rss_bytes"] > 10_000_000


def test_bands_cover_all_timesteps_and_their_names_sort_as_they_do():
    names = [band_name(band) for band in range(NUM_BANDS)]

    assert [band_of(t) for t in (0.0, 0.001, 0.1, 0.95, 1.0)] == [0, 0, 1, 9, 9]
    assert [band_of(centre(band)) for band in range(NUM_BANDS)] == list(range(NUM_BANDS))
    assert sorted(names) == names
    assert mean_by_band([(0.05, 1.0), (0.01, 3.0), (1.0, 5.0)], "x/") == {"x/0.0-0.1": 2.0, "x/0.9-1.0": 5.0}


def test_a_step_is_charted_by_timestep_bucket_and_dataset():
    metrics = report(0.5).metrics()

    assert sum(name.startswith("loss_by_timestep/") for name in metrics) == 6
    assert {name for name in metrics if name.startswith("loss_by_bucket/")} <= {
        "loss_by_bucket/128x64",
        "loss_by_bucket/64x64",
    }
    assert metrics["loss_by_dataset/d"] == 0.5


def test_losses_by_bucket_are_those_of_its_images():
    row = run_toy(toy_config()).recorder.rows[0]
    by_bucket = [value for name, value in row.items() if name.startswith("loss_by_bucket/")]

    assert min(by_bucket) <= row["train/loss"] <= max(by_bucket)
    assert not any(name.startswith("loss_by_timestep/") for name in row)  # the toy has none
