import math

import pytest

from training.metrics_file import MetricsError, append_metrics, read_metrics, trim_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(path):
    return [row["global_step"] for row in read_metrics(path)]


def test_rows_are_read_back_as_appended(path):
    append_metrics(path, [{"global_step": 1, "train/loss": 0.1 + 0.2}], durable=True)
    append_metrics(path, [{"global_step": 2, "train/loss": math.inf, "note": "é"}, {"global_step": 3, "x": math.nan}])

    rows = list(read_metrics(path))

    assert rows[:2] == [
        {"global_step": 1, "train/loss": 0.1 + 0.2},
        {"global_step": 2, "train/loss": math.inf, "note": "é"},
    ]
    assert math.isnan(rows[2]["x"])


def test_no_file_has_no_rows(path):
    assert steps(path) == []
    assert trim_metrics(path, after_step=3) == 0


@pytest.mark.parametrize("step", [None, 1.0, True, "1"])
def test_a_row_without_its_step_is_refused(path, step):
    with pytest.raises(ValueError, match="global_step"):
        append_metrics(path, [{"global_step": step}])


def test_rows_after_the_loaded_state_are_dropped(path):
    append_metrics(path, [{"global_step": step} for step in range(1, 9)])

    assert trim_metrics(path, after_step=5) == 3
    assert steps(path) == [1, 2, 3, 4, 5]
    before = path.stat().st_ino
    assert trim_metrics(path, after_step=5) == 0
    assert path.stat().st_ino == before  # nothing to drop: not rewritten


def test_an_unterminated_last_line_is_cut(path, caplog):
    append_metrics(path, [{"global_step": 1}])
    with path.open("ab") as stream:
        stream.write(b'{"global_step": 2, "lo')

    assert steps(path) == [1]
    assert trim_metrics(path, after_step=5) == 0
    assert path.read_bytes() == b'{"global_step": 1}\n'
    assert "unterminated" in caplog.text


def test_a_line_broken_in_the_middle_is_named(path):
    path.write_bytes(b'{"global_step": 1}\n{"glo\n{"global_step": 3}\n')

    with pytest.raises(MetricsError, match="line 2"):
        trim_metrics(path, after_step=5)
