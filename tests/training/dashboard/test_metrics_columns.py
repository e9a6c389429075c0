"""metrics.jsonl in memory: read on, cut back, damaged, sampled; and binned for the page."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.dashboard import metrics_columns
from training.dashboard.curves import binned, mean_between
from training.dashboard.metrics_columns import STEP, MetricsColumns
from training.metrics_file import append_metrics, trim_metrics


def rows(first, last, **more):
    return [
        {"global_step": step, "train/loss": 1 / step, "train/images_seen": 4 * step, "lr/unet": 1e-5, **more}
        for step in range(first, last + 1)
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_only_whole_new_lines_are_taken_in(path):
    metrics = MetricsColumns(path)
    assert metrics.read_on() and metrics.columns()[STEP].size == 0 and metrics.known_fraction == 1

    append_metrics(path, rows(1, 10))
    with path.open("a") as stream:
        stream.write('{"global_step": 11, "train/lo')
    assert metrics.read_on()

    assert metrics.columns()[STEP].tolist() == list(range(1, 11))
    assert metrics.known_fraction < 1
    with path.open("a") as stream:
        stream.write('ss": 0.5}\n')
    metrics.read_on()
    assert metrics.columns()["train/loss"][-1] == 0.5
    assert np.isnan(metrics.columns()["lr/unet"][-1])


@pytest.mark.parametrize("merge_bytes", [0, 300, 1 << 20])
def test_what_a_resume_cut_away_is_forgotten_and_what_it_wrote_anew_is_known(path, monkeypatch, merge_bytes):
    monkeypatch.setattr(metrics_columns, "_MERGE_BYTES", merge_bytes)
    metrics = MetricsColumns(path)
    for first in range(1, 100, 10):
        append_metrics(path, rows(first, first + 9))
        metrics.read_on()

    trim_metrics(path, after_step=73)
    append_metrics(path, [{"global_step": step, "train/loss": 7.0} for step in range(74, 120)])
    metrics.read_on()

    columns = metrics.columns()
    assert columns[STEP].tolist() == list(range(1, 120))
    assert columns["train/loss"][72] == pytest.approx(1 / 73) and set(columns["train/loss"][73:]) == {7.0}


def test_a_file_longer_than_a_block_is_read_whole(path, monkeypatch):
    monkeypatch.setattr("training.dashboard.grown_file.read_blocks.__kwdefaults__", {"block_bytes": 100})
    append_metrics(path, rows(1, 50))
    metrics = MetricsColumns(path)

    assert not metrics.read_on(for_seconds=0) and 0 < metrics.known_fraction < 1
    assert metrics.read_on()
    assert metrics.columns()[STEP].tolist() == list(range(1, 51))


def test_words_for_numbers_and_damaged_lines_do_not_hide_the_others(path):
    append_metrics(path, [*rows(1, 3), {"global_step": 4, "train/loss": math.nan, "train/grad_norm": math.inf}])
    with path.open("a") as stream:
        stream.write('\x00\x00\x00\n[1, 2]\n{"global_step": "five"}\n')
    append_metrics(path, rows(6, 8))
    metrics = MetricsColumns(path)
    metrics.read_on()

    assert metrics.columns()[STEP].tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert metrics.num_bad_lines == 3
    assert binned(metrics.columns())["not_finite"] == {"train/grad_norm": 1}


def test_a_sample_is_from_all_over_the_file_and_in_order(path):
    append_metrics(path, rows(1, 3000))
    sample = MetricsColumns(path).sample(100)

    assert 90 <= sample[STEP].size <= 100
    assert (np.diff(sample[STEP]) > 0).all() and sample[STEP][0] < 60 and sample[STEP][-1] > 2900
    assert MetricsColumns(path).last_rows()[-1]["global_step"] == 3000


def test_bins_hold_mean_least_and_most_and_lose_no_row(path):
    append_metrics(path, [*rows(1, 1000), {"global_step": 1000, "validation/loss": 0.25}])
    metrics = MetricsColumns(path)
    metrics.read_on()

    curves = binned(metrics.columns(), num_bins=100)

    loss = curves["curves"]["train/loss"]
    assert len(curves["x"]["step"]) == 100 and curves["num_rows"] == 1001
    expected = [1 / step for step in range(11, 21)]
    assert loss["mean"][1] == pytest.approx(np.mean(expected), rel=1e-4)
    assert loss["least"][1] == pytest.approx(min(expected), rel=1e-4)
    assert loss["most"][1] == pytest.approx(max(expected), rel=1e-4)
    assert curves["curves"]["validation/loss"]["mean"] == [None] * 99 + [0.25]
    assert curves["x"]["images"][-1] == 4000 and sorted(curves["x"]["images"]) == curves["x"]["images"]
    assert "train/grad_norm" not in curves["curves"]
    json.dumps(curves, allow_nan=False)


def test_few_steps_are_shown_one_by_one_and_from_a_step_on(path):
    append_metrics(path, rows(1, 20))
    metrics = MetricsColumns(path)
    metrics.read_on()

    curves = binned(metrics.columns(), first_step=16)

    assert curves["x"]["step"] == [16, 17, 18, 19, 20]
    assert curves["curves"]["train/loss"]["mean"][0] == pytest.approx(1 / 16)
    assert binned(metrics.columns(), first_step=99)["x"] == {"step": [], "images": []}


def test_means_between_steps(path):
    append_metrics(path, rows(1, 10))
    metrics = MetricsColumns(path)
    metrics.read_on()

    means = mean_between(metrics.columns(), "train/loss", [(0, 2), (2, 2), (9, 50)])

    assert means == [pytest.approx(0.75), None, pytest.approx(0.1)]


def test_rows_out_of_order_are_binned_all_the_same(path):
    append_metrics(path, [*rows(1, 40), {"global_step": 7, "train/loss": 9.0}])
    metrics = MetricsColumns(path)
    metrics.read_on()

    loss = binned(metrics.columns(), num_bins=4)["curves"]["train/loss"]

    assert loss["most"][0] == 9.0 and loss["least"][0] == pytest.approx(0.1)
    assert loss["mean"][0] == pytest.approx((sum(1 / step for step in range(1, 11)) + 9) / 11, rel=1e-4)


def test_columns_are_made_without_pandas(path):
    append_metrics(path, rows(1, 3))
    code = (
        "import sys; from pathlib import Path; from training.dashboard.metrics_columns import MetricsColumns\n"
        f"before = 'pandas' in sys.modules; MetricsColumns(Path({str(path)!r})).read_on()\n"
        "assert ('pandas' in sys.modules) == before == False"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
