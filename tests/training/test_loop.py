"""The order of a step, what enters the loss, and the counters: with a toy recipe, in one process."""

import json

import pytest
import torch

from tests.training.toy import ToyRecipe, run_toy, toy_batches, toy_config, toy_plan
from training.errors import BrokenDataError, NonFiniteError
from training.position import Position


def gradients_by_hand(config, *, broken=()):
    """(1/N) Σ w L over the images of each step that could be read, written out; weights stay where they start."""
    plan, module = toy_plan(config), ToyRecipe().module
    for step in plan.steps:
        used = [s for micro_batch in step.micro_batches for s in micro_batch.samples if s.key not in broken]
        losses = []
        for batch in toy_batches(plan):
            for slot, identity in enumerate(batch.identities):
                if batch.step == step.number and identity.key not in broken:
                    rgb = batch.images[slot].float() / 255
                    loss = (module(rgb.flatten()) - rgb.mean(dim=(1, 2))).square().mean()
                    losses.append(batch.loss_weights[slot] * loss)
        module.zero_grad()
        (sum(losses) / len(used)).backward()
        yield [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("broken", [(), ("0003", "0005", "0006")])
def test_a_step_averages_over_its_images_however_they_are_batched(broken):
    config = toy_config(optimizer={"learning_rate": 1e-12})  # every step's gradient at the first weights

    run = run_toy(config, broken=broken)

    expected = list(gradients_by_hand(config, broken=broken))
    assert len(run.gradients) == len(expected) > 2
    for step, by_hand in zip(run.gradients, expected, strict=True):
        for one, other in zip(step, by_hand, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_gradients_are_rescaled_for_broken_images_before_they_are_clipped():
    config = toy_config(optimizer={"learning_rate": 1e-12, "max_grad_norm": 1e-3})

    run = run_toy(config, broken=("0003", "0005"))

    norms = [float(torch.stack([g.square().sum() for g in step]).sum().sqrt()) for step in run.gradients]
    by_hand = [
        float(torch.stack([g.square().sum() for g in step]).sum().sqrt())
        for step in gradients_by_hand(config, broken=("0003", "0005"))
    ]
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)
    assert [row["train/grad_norm"] for row in run.recorder.rows] == pytest.approx(by_hand, rel=1e-4)


def test_counters_add_up_and_the_ledger_hears_of_what_was_not_trained():
    config = toy_config()
    plan = toy_plan(config)
    nan_key = plan.steps[1].micro_batches[0].samples[0].key
    broken_key = plan.steps[0].micro_batches[1].samples[0].key

    run = run_toy(config, broken=(broken_key,), nan_keys=(nan_key,))

    position = run.position
    lost = [s.key for micro_batch in plan.steps[1].micro_batches for s in micro_batch.samples]
    assert position.step == position.global_step == len(plan.steps)
    assert (position.applied_updates, position.skipped_steps) == (len(plan.steps) - 1, 1)
    assert (position.broken_images, position.chunk_images_broken) == (1, 1)
    assert position.chunk_images_skipped == len(lost)
    assert position.images_seen == position.chunk_images_trained == plan.num_images - 1 - len(lost)
    assert run.recorder.events == [
        ("broken", 0, [(broken_key, "bad")]),
        ("skipped", 1, sorted(lost), "not_finite", [nan_key]),
    ]
    assert [row["train/skipped"] for row in run.recorder.rows][:3] == [0, 1, 0]
    assert run.recorder.rows[-1]["train/images_seen"] == position.images_seen
    json.dumps([run.recorder.rows, run.recorder.traces], allow_nan=False)


def test_a_step_that_is_passed_over_changes_no_weight_and_no_table():
    config = toy_config(max_skipped_steps=100)
    everything = tuple(f"{key:04d}" for key in range(14))
    initial = ToyRecipe().module.state_dict()

    run = run_toy(config, nan_keys=everything, adaptive=True)

    assert all(torch.equal(run.weights[name], value) for name, value in initial.items())
    assert torch.equal(run.table, torch.ones(300, dtype=torch.float64))
    assert run.position.applied_updates == 0 and run.position.images_seen == 0


def test_a_step_without_a_readable_image_is_passed_over():
    config = toy_config()
    keys = tuple(s.key for micro_batch in toy_plan(config).steps[0].micro_batches for s in micro_batch.samples)

    run = run_toy(config, broken=keys)

    assert ("skipped", 0, sorted(keys), "no_image", []) in run.recorder.events
    assert run.position.skipped_steps == 1


def test_many_steps_in_a_row_without_a_finite_update_end_the_run():
    with pytest.raises(NonFiniteError, match="2 steps in a row without a finite update"):
        run_toy(toy_config(max_skipped_steps=1), nan_keys=tuple(f"{key:04d}" for key in range(14)))


def test_steps_that_are_passed_over_are_counted_but_not_tried():
    config = toy_config()
    plan = toy_plan(config)
    keys = sorted(s.key for micro_batch in plan.steps[1].micro_batches for s in micro_batch.samples)

    run = run_toy(config, pass_over=(2,), nan_keys=tuple(keys), broken=tuple(keys[:1]))

    assert run.recorder.events == [("skipped", 1, keys, "passed_over", [])]
    assert run.position.chunk_images_skipped == len(keys) == run.position.skipped_steps * plan.steps[1].num_images
    assert run.recorder.traces[1]["samples"] == [] and "train/loss" not in run.recorder.rows[1]
    assert len(run.gradients) == len(plan.steps) - 1


@pytest.mark.parametrize("every_steps", [2, 1000])
def test_a_stop_in_previews_is_honoured_with_one_state(every_steps):
    run = run_toy(toy_config(save={"every_steps": every_steps}), stop_in_preview_at=2)

    assert (run.position.step, run.reason) == (2, "asked in previews")
    assert run.recorder.events == [("save", 2)]
    assert run.recorder.watched == [1, 2]


def test_too_many_broken_images_end_the_run():
    with pytest.raises(BrokenDataError, match=r"of 14 images could not be read \(max_broken_fraction 0.1\)"):
        run_toy(toy_config(data={"max_broken_fraction": 0.1}), broken=("0001", "0002", "0003"))


def test_states_come_at_global_steps_and_neither_they_nor_previews_twice_at_the_end():
    config = toy_config(save={"every_steps": 2})
    num_steps = len(toy_plan(config).steps)

    run = run_toy(config, position=Position(chunk="toy/0000", global_step=7))

    saves = [event[1] for event in run.recorder.events if event[0] == "save"]
    assert run.recorder.watched == list(range(8, 7 + num_steps))
    assert saves == [step for step in run.recorder.watched if step % 2 == 0]


def test_a_state_that_falls_due_between_two_epochs_of_a_chunk_is_saved():
    num_steps = len(toy_plan(toy_config()).steps)
    settings = {"save": {"every_steps": num_steps}}

    between = run_toy(toy_config(data={"epochs": 2}, **settings))
    at_the_end = run_toy(toy_config(data={"epochs": 1}, **settings))

    assert (between.recorder.events, between.recorder.watched[-1]) == ([("save", num_steps)], num_steps)
    assert at_the_end.recorder.events == []  # the chunk's final state and previews follow


def test_a_stop_is_honoured_after_the_step_with_a_state():
    run = run_toy(toy_config(), stop_at=2)

    assert (run.position.step, run.reason) == (2, "asked")
    assert run.recorder.events[-1] == ("save", 2)
    assert run.recorder.watched == [1]


def test_a_run_in_two_pieces_equals_one_in_one_piece_with_dropout_and_all():
    config = toy_config(optimizer={"learning_rate": 1e-12})
    whole = run_toy(config, dropout=0.5)

    first = run_toy(config, dropout=0.5, stop_at=2)
    rest = run_toy(config, dropout=0.5, position=first.position)

    assert first.recorder.traces + rest.recorder.traces == whole.recorder.traces
    for one, other in zip(first.gradients + rest.gradients, whole.gradients, strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))


def test_a_nan_in_the_slot_of_a_broken_image_reaches_nothing():
    config = toy_config()

    run = run_toy(config, broken=("0003",), nan_keys=("0003",))

    assert [event[0] for event in run.recorder.events] == ["broken"]
    assert all("train/loss" in row for row in run.recorder.rows)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_lower_the_loss(optimizer):
    run = run_toy(toy_config(optimizer={"learning_rate": 0.02}), optimizer=optimizer)

    assert run.recorder.rows[-1]["train/loss"] < run.recorder.rows[0]["train/loss"]
