import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.training.toy import toy_config
from training.chart_layout import GROUPS
from training.run_dir import RunDir
from training.tracker_feed import TrackerFeed, exported_weights
from training.trackers import LAYOUT_TAG, Trackers, chart_values, make_trackers
from training.wandb_file import read_history
from training.wandb_tracker import WandB


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


class FakeWandB(FakeTracker, WandB):
    """Remembers the links it was given. linked_before: the last one that it finds in its files."""

    name = "wandb"

    def __init__(self, *, linked_before=None, **rest):
        super().__init__(is_kept=False, **rest)
        self.links, self._linked_before = [], linked_before

    def link_weights(self, folder, *, chunk, step):
        self.links.append((step, chunk, folder.name))

    def last_weights_step(self):
        return self._linked_before


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


def exports(*steps):
    return {step: (f"a/{step:04d}", Path(f"weights-{step}")) for step in steps}


def test_wandb_is_told_of_weights_once_and_in_order_and_only_of_steps_that_it_has(tmp_path):
    path, first, second = tmp_path / "trackers.json", FakeWandB(), FakeWandB(last_step=4, linked_before=4)

    for wandb, last in ((first, 4), (second, 6)):
        trackers = Trackers([FakeTracker(), wandb], path)
        trackers.feed(rows(*range(1, last + 1)), {}, up_to_step=last)
        trackers.link_weights(exports(6, 4, 2))
        trackers.link_weights(exports(6, 4, 2))

    assert first.links == [(2, "a/0002", "weights-2"), (4, "a/0004", "weights-4")]
    assert second.links == [(6, "a/0006", "weights-6")]


@pytest.mark.parametrize("found, steps", [(2, [4]), (-1, [2, 4]), (None, [])])
def test_links_that_wandb_lost_from_memory_in_a_kill_are_made_again(tmp_path, found, steps):
    path, again = tmp_path / "trackers.json", FakeWandB(last_step=4, linked_before=found)
    before = Trackers([FakeWandB()], path)
    before.feed(rows(1, 2, 3, 4), {}, up_to_step=4)
    before.link_weights(exports(2, 4))

    resumed = Trackers([again], path)
    resumed.feed(rows(1, 2, 3, 4, 5), {}, up_to_step=5)
    resumed.link_weights(exports(2, 4))

    assert [step for step, *_ in again.links] == steps


def test_a_link_that_wandb_refuses_is_warned_of_and_stops_nothing(tmp_path, caplog):
    wandb = WandB.__new__(WandB)
    wandb._wandb = wandb._run = SimpleNamespace(id="r-1")  # has no Artifact

    wandb.link_weights(tmp_path, chunk="a/0000", step=3)

    assert f"no link to {tmp_path} in W&B: AttributeError" in caplog.text


def test_only_weights_of_finished_chunks_are_linked_to(tmp_path):
    run_dir = RunDir(tmp_path)
    for chunk in ("a/0000", "a/0001", "solo"):
        run_dir.weights_folder(chunk).mkdir(parents=True)
    run_dir.write_complete("a/0000", global_step=10)
    run_dir.write_complete("solo", global_step=20)
    run_dir.chunk_folder("a/0002").mkdir()
    run_dir.write_complete("a/0002", global_step=30)  # its weights are gone, or were never exported

    found = exported_weights(run_dir)

    assert found == {
        10: ("a/0000", run_dir.weights_folder("a/0000")),
        20: ("solo", run_dir.weights_folder("solo")),
    }


def test_the_end_of_a_chunk_is_when_weights_are_linked_to(tmp_path, monkeypatch):
    wandb, run_dir = FakeWandB(), RunDir(tmp_path)
    monkeypatch.setattr("training.tracker_feed.make_trackers", lambda *_, **__: [wandb])
    feed = TrackerFeed(toy_config(), run_dir, wandb_id="", step=0)
    run_dir.weights_folder("a/0000").mkdir(parents=True)
    run_dir.write_complete("a/0000", global_step=2)
    for row in rows(1, 2):
        feed.add(row)
    feed.covered_step = 2

    feed.feed()
    links_before = list(wandb.links)
    feed.feed(is_complete=True)
    run_dir.complete_path("a/0000").write_text("{")
    feed.feed(is_complete=True)  # a damaged file is warned of

    assert links_before == []
    assert wandb.links == [(2, "a/0000", "weights")]


def test_charts_get_finite_numbers_only():
    row = {"global_step": 1, "chunk": "a", "step": 2, "train/loss": 0.5, "x/nan": math.nan, "x/text": "nan", "x/int": 3}

    assert chart_values(row) == {"train/loss": 0.5, "x/int": 3.0}


@pytest.mark.slow
def test_two_launches_are_one_rising_series_in_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")

    for steps in ((1, 2, 3), (4, 5)):  # the second launch reads the first's metrics again; a free setting has changed
        config = {"seed": 1, "workers": len(steps)}
        tracker = WandB(tmp_path / "wandb", project="p", run_name="r", run_id="r-1", mode="offline", config=config)
        trackers = Trackers([tracker], tmp_path / "trackers.json")
        trackers.feed(rows(*range(1, steps[-1] + 1)), {}, up_to_step=steps[-1])
        trackers.close()

    wandb.teardown()  # launches of other tests would go to its service
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
