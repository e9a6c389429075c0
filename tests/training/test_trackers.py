import math
import re
import time

import pytest
from PIL import Image

from tests.training.toy import toy_config
from training.chart_layout import GROUPS
from training.run_dir import RunDir
from training.trackers import LAYOUT_TAG, Trackers, WandB, chart_values, make_trackers
from training.wandb_file import read_history


class FakeTracker:
    """Remembers what it was given; breaks at a step, like a kill, when told to."""

    name = "fake"

    def __init__(self, *, breaks_at=None, is_kept=True, last_step=None):
        self.points, self.pictures, self.breaks_at = [], [], breaks_at
        self.is_kept, self._last_step = is_kept, last_step

    def point(self, step, values, pictures):
        if step == self.breaks_at:
            raise KeyboardInterrupt
        self.points.append((step, dict(values)))
        if pictures:
            self.pictures.append((step, sorted(pictures)))

    def last_step(self):
        return self._last_step

    def flush(self):
        pass

    def close(self):
        pass


def rows(*steps):
    return [{"global_step": step, "chunk": "a/0000", "train/loss": step / 10} for step in steps]


def test_steps_come_in_order_once_and_only_as_far_as_a_state_covers_them(tmp_path):
    tracker = FakeTracker()
    trackers = Trackers([tracker], tmp_path / "trackers.json")

    trackers.feed(rows(1, 3, 2, 4), {}, up_to_step=3)
    trackers.feed(rows(1, 2, 3, 4, 5), {}, up_to_step=5)
    trackers.feed(rows(4, 5), {}, up_to_step=5)

    assert [step for step, _ in tracker.points] == [1, 2, 3, 4, 5]
    assert tracker.points[0] == (1, {"train/loss": 0.1})
    assert trackers.fed == 5


def test_the_next_launch_goes_on_behind_what_was_fed(tmp_path):
    path, again = tmp_path / "trackers.json", FakeTracker()
    Trackers([FakeTracker()], path).feed(rows(1, 2), {}, up_to_step=2)

    resumed = Trackers([again], path)
    fed_before = resumed.fed
    resumed.feed(rows(1, 2, 3), {}, up_to_step=3)

    assert fed_before == 2
    assert [step for step, _ in again.points] == [3]


def test_a_kill_while_feeding_a_tracker_that_cannot_say_how_far_it_came_doubles_no_point(tmp_path):
    path, killed, again = tmp_path / "trackers.json", FakeTracker(breaks_at=2), FakeTracker()

    with pytest.raises(KeyboardInterrupt):
        Trackers([killed], path).feed(rows(1, 2, 3), {}, up_to_step=3)
    Trackers([again], path).feed(rows(1, 2, 3, 4), {}, up_to_step=4)

    steps = [step for step, _ in killed.points + again.points]
    assert steps == [1, 4]


@pytest.mark.parametrize("last_step, steps", [(3, [4, 5]), (None, [5]), (9, [5])])
def test_what_a_tracker_lost_from_memory_in_a_kill_is_fed_again(tmp_path, last_step, steps):
    path, again = tmp_path / "trackers.json", FakeTracker(is_kept=False, last_step=last_step)
    Trackers([FakeTracker(is_kept=False)], path).feed(rows(1, 2, 3, 4), {}, up_to_step=4)

    Trackers([again], path).feed(rows(1, 2, 3, 4, 5), {}, up_to_step=5)

    assert [step for step, _ in again.points] == steps


def test_a_tracker_that_joins_later_gets_everything(tmp_path):
    path, late = tmp_path / "trackers.json", FakeTracker()
    late.name = "late"
    Trackers([FakeTracker()], path).feed(rows(1, 2), {}, up_to_step=2)

    Trackers([FakeTracker(), late], path).feed(rows(1, 2, 3), {}, up_to_step=3)

    assert [step for step, _ in late.points] == [1, 2, 3]


def test_a_tracker_that_was_off_goes_on_where_it_was(tmp_path):
    path, again = tmp_path / "trackers.json", FakeTracker()
    other = FakeTracker()
    other.name = "other"
    Trackers([FakeTracker(), other], path).feed(rows(1, 2), {}, up_to_step=2)
    Trackers([other], path).feed(rows(1, 2, 3), {}, up_to_step=3)

    Trackers([again, other], path).feed(rows(1, 2, 3, 4), {}, up_to_step=4)

    assert [step for step, _ in again.points] == [3, 4]


def test_pictures_go_with_their_step(tmp_path):
    tracker = FakeTracker()
    path = tmp_path / "strip.png"
    Image.new("RGB", (4, 4)).save(path)

    Trackers([tracker], tmp_path / "trackers.json").feed(rows(1, 2), {2: {"preview/strip": path}}, up_to_step=2)

    assert tracker.pictures == [(2, ["preview/strip"])]


def test_what_is_said_of_a_step_in_two_rows_is_one_point(tmp_path):
    tracker = FakeTracker()
    validation = {"global_step": 2, "chunk": "a/0000", "validation/loss": 0.7}

    Trackers([tracker], tmp_path / "trackers.json").feed([*rows(1, 2), validation], {}, up_to_step=2)

    assert tracker.points == [(1, {"train/loss": 0.1}), (2, {"train/loss": 0.2, "validation/loss": 0.7})]


def test_tensorboard_has_one_series_over_launches_and_the_settings_of_each(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last, seed in ((3, 1), (5, 2)):
        (board,) = made = make_trackers(toy_config(seed=seed), RunDir(tmp_path), wandb_id="", step=last - 3)
        trackers = Trackers(made, tmp_path / "trackers.json")
        trackers.feed(rows(*range(1, last + 1)), {}, up_to_step=last)
        board.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")]
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")] == [
        (step, step / 10) for step in range(1, 6)
    ]
    assert ["    seed = 1" in texts[0], "    seed = 2" in texts[1]] == [True, True]


def test_a_kill_while_tensorboard_is_fed_costs_no_point_and_doubles_none(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, steps = tmp_path / "trackers.json", range(1, 7)
    (first,) = make_trackers(toy_config(), RunDir(tmp_path), wandb_id="", step=0)
    point = first.point
    monkeypatch.setattr(first, "point", lambda step, *rest: point(step, *rest) if step < 4 else first.flush() or 1 / 0)
    trackers = Trackers([first], path)
    trackers.feed(rows(1, 2), {}, up_to_step=2)
    with pytest.raises(ZeroDivisionError):
        trackers.feed(rows(*steps), {}, up_to_step=6)

    resumed = Trackers(make_trackers(toy_config(), RunDir(tmp_path), wandb_id="", step=6), path)
    fed_before = resumed.fed
    resumed.feed(rows(*steps), {}, up_to_step=6)
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert fed_before == 3
    # sorted: of one process and second, file 10 is read before file 9
    assert sorted(event.step for event in events.Scalars("train/loss")) == list(steps)


def test_tensorboard_groups_the_charts_by_one_layout_per_run(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    for step in (0, 5):
        (board,) = make_trackers(toy_config(), RunDir(tmp_path), wandb_id="", step=step)
        board.point(step + 1, {"train/loss": 0.1, "lr/network": 1e-5, "verdict/gap/cat": 0.2}, {})
        board.close()

    layouts = [
        value.tensor.string_val[0]
        for path in (tmp_path / "tensorboard").glob("events.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == LAYOUT_TAG
    ]
    whole = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    (found,) = whole.Tensors(".", LAYOUT_TAG)
    layout = Layout.FromString(found.tensor_proto.string_val[0])
    charts = {
        tag
        for category in layout.category
        for chart in category.chart
        for pattern in chart.multiline.tag
        for tag in ("train/loss", "lr/network", "verdict/gap/cat")
        if re.search(pattern, tag)
    }
    assert len(layouts) == 1
    assert [category.title for category in layout.category] == list(GROUPS)
    assert charts == {"train/loss", "lr/network", "verdict/gap/cat"}


def test_an_older_run_gets_the_layout_from_the_next_launch(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr("training.trackers._has_layout", lambda path: True)
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / "events.out.tfevents.1.old").touch()
        make_trackers(toy_config(), RunDir(tmp_path), wandb_id="", step=0)[0].close()
    make_trackers(toy_config(), RunDir(tmp_path), wandb_id="", step=0)[0].close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tensors(LAYOUT_TAG)) == 1


def test_charts_get_finite_numbers_only():
    row = {"global_step": 1, "chunk": "a", "step": 2, "train/loss": 0.5, "x/nan": math.nan, "x/text": "nan", "x/int": 3}

    assert chart_values(row) == {"train/loss": 0.5, "x/int": 3.0}


@pytest.mark.slow
def test_two_launches_are_one_rising_series_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")

    for steps in ((1, 2, 3), (4, 5)):  # the second launch reads the first's metrics again; a free setting has changed
        config = {"seed": 1, "workers": len(steps)}
        tracker = WandB(tmp_path / "wandb", project="p", run_name="r", run_id="r-1", mode="offline", config=config)
        trackers = Trackers([tracker], tmp_path / "trackers.json")
        trackers.feed(rows(*range(1, steps[-1] + 1)), {}, up_to_step=steps[-1])
        trackers.close()

    files = list((tmp_path / "wandb").rglob("run-r-1.wandb"))
    for _ in range(100):  # W&B's own process may write the end of a file after `finish` has returned
        series = sorted(
            (row for path in files for row in read_history(path) if "train/loss" in row), key=lambda row: row["_step"]
        )
        if len(series) == 5:
            break
        time.sleep(0.1)
    assert len(files) == 2
    assert [row["global_step"] for row in series] == [row["_step"] for row in series] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in series] == [0.1, 0.2, 0.3, 0.4, 0.5]
