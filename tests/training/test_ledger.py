import json
import os

import pytest

from sharding.files import DiskFullError
from training.chunk_records import chunk_records, chunks_since, has_state, parent_of, steps_to_pass_over, totals
from training.ledger import EVENTS, Ledger, LedgerError, read_ledger


def allow():
    """Stand for a lock that is held."""


def open_ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger.jsonl", guard=allow)


def start(
    ledger, chunk, *, global_step=0, position=0, parent=None, plan="p1", resumed_from=None, devices="2 x cpu", epochs=1
):
    return ledger.append(
        "started", chunk=chunk, position_in_run=position, parent=parent, chunk_digest=f"d-{chunk}", plan_digest=plan,
        epochs=epochs, steps=10 * epochs, images_planned=40 * epochs,
        global_step=global_step, resumed_from=resumed_from, devices=devices,
    )  # fmt: skip


def save(ledger, chunk, global_step, *, images, event="state_saved", updates=None, seconds=1.0):
    return ledger.append(
        event, chunk=chunk, path=f"chunks/{chunk}/state-{global_step}", manifest_digest=f"m{global_step}", epoch=0,
        step=global_step, global_step=global_step, images_trained=images,
        applied_updates=images // 4 if updates is None else updates, busy_seconds=seconds,
    )  # fmt: skip


def skip(ledger, chunk, global_step, *, keys=("a", "b"), reason="not_finite"):
    ledger.append("skipped", chunk=chunk, epoch=0, step=global_step, global_step=global_step, keys=keys, reason=reason)


def test_lines_are_read_back_as_they_were_appended(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "newest/0000")
    save(ledger, "newest/0000", 4, images=16, seconds=0.1 + 0.2)
    skip(ledger, "newest/0000", 5, keys=("é", "b"))

    assert tuple(read_ledger(ledger.path)) == ledger.lines
    assert [line.number for line in ledger.lines] == [0, 1, 2]
    assert Ledger.open(ledger.path, guard=allow).lines == ledger.lines


def test_a_missing_ledger_is_an_empty_one(tmp_path):
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    assert totals([]).global_step == 0
    assert parent_of([], "newest/0000") is None


@pytest.mark.parametrize("event", EVENTS)
def test_a_line_without_one_of_its_fields_is_refused(tmp_path, event):
    ledger = open_ledger(tmp_path)

    with pytest.raises(LedgerError, match=EVENTS[event][-1]):
        ledger.append(event, **dict.fromkeys(EVENTS[event][:-1]))

    assert ledger.path.read_bytes() == b""


def test_unknown_events_and_chunks_that_never_started_are_refused(tmp_path):
    ledger = open_ledger(tmp_path)

    with pytest.raises(LedgerError, match="unknown event 'finished'"):
        ledger.append("finished")
    with pytest.raises(LedgerError, match="no 'started' line"):
        save(ledger, "newest/0000", 4, images=16)


def test_nothing_is_written_when_the_guard_refuses(tmp_path):
    ledger = open_ledger(tmp_path)

    def refuse():
        raise RuntimeError("lost")

    ledger._guard = refuse
    with pytest.raises(RuntimeError, match="lost"):
        start(ledger, "newest/0000")

    assert ledger.path.read_bytes() == b""


def test_any_changed_byte_is_found_and_its_line_named(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "newest/0000")
    save(ledger, "newest/0000", 4, images=16)
    skip(ledger, "newest/0000", 5)
    good = ledger.path.read_bytes()
    ends = [at for at, byte in enumerate(good) if byte == 10]

    for at in range(0, len(good) - 1, 3):
        ledger.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        number = sum(end < at for end in ends) + 1
        with pytest.raises(LedgerError, match=f"line {number}"):
            read_ledger(ledger.path)


@pytest.mark.parametrize("tamper", ["remove", "swap", "repeat", "blank", "space", "rehash"])
def test_a_removed_added_moved_or_rewritten_line_is_found(tmp_path, tamper):
    ledger = open_ledger(tmp_path)
    start(ledger, "newest/0000")
    for step in (2, 4, 6):
        save(ledger, "newest/0000", step, images=4 * step)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    if tamper == "remove":
        del lines[1]
    elif tamper == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    elif tamper == "repeat":
        lines.insert(1, lines[1])
    elif tamper == "blank":
        lines.insert(1, b"\n")
    elif tamper == "space":
        lines[1] = lines[1].replace(b'{"number": 1', b'{"number":  1')
    else:  # a forger who computes the line's own hash but not the rest of the chain
        from sharding.files import digest_of

        value = json.loads(lines[1])
        value["fields"]["images_trained"] = 9999
        del value["hash"]
        lines[1] = (json.dumps({**value, "hash": digest_of(value)}) + "\n").encode()
    ledger.path.write_bytes(b"".join(lines))

    with pytest.raises(LedgerError, match=r"line [23]"):
        read_ledger(ledger.path)
    with pytest.raises(LedgerError):
        Ledger.open(ledger.path, guard=allow)


@pytest.mark.parametrize("rest", [b'{"number": 1, "ti', b"\0" * 40, b"x"])
def test_an_unterminated_last_line_is_cut_and_reported(tmp_path, caplog, rest):
    ledger = open_ledger(tmp_path)
    start(ledger, "newest/0000")
    good = ledger.path.read_bytes()
    ledger.path.write_bytes(good + rest)

    assert len(read_ledger(ledger.path)) == 1
    assert ledger.path.read_bytes() == good + rest  # readers change nothing
    again = Ledger.open(ledger.path, guard=allow)

    assert [line.event for line in again.lines] == ["started", "recovered"]
    assert again.lines[1].fields["num_bytes"] == len(rest)
    assert "unterminated" in caplog.text
    assert tuple(read_ledger(ledger.path)) == again.lines


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    start(ledger, "newest/0000")
    good = ledger.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))

    with pytest.raises(DiskFullError, match=r"ledger\.jsonl"):
        save(ledger, "newest/0000", 4, images=16)

    monkeypatch.undo()
    assert ledger.path.read_bytes() == good
    save(ledger, "newest/0000", 4, images=16)
    assert len(read_ledger(ledger.path)) == 2


def test_a_line_appended_by_another_program_is_noticed(tmp_path):
    first, second = open_ledger(tmp_path), open_ledger(tmp_path)
    start(first, "newest/0000")

    with pytest.raises(LedgerError, match="another program"):
        start(second, "newest/0000")


def test_a_record_counts_what_its_newest_state_holds(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "a/0000")
    save(ledger, "a/0000", 4, images=12, updates=3, seconds=8.0)
    skip(ledger, "a/0000", 3)
    ledger.append("broken", chunk="a/0000", epoch=0, step=4, global_step=4, keys=["k"], reasons=["truncated"])
    save(ledger, "a/0000", 10, images=35, updates=9, seconds=20.0, event="chunk_done")

    record = chunk_records(ledger.lines)["a/0000"]

    assert (record.status, record.images_trained, record.skipped, record.broken) == ("done", 35, 1, 1)
    assert record.last_state == ("chunks/a/0000/state-10", 10)
    assert (record.seconds, record.devices, record.plan_digests) == (20.0, ("2 x cpu",), ("p1",))
    figures = totals(ledger.lines)
    assert (figures.global_step, figures.images_seen, figures.applied_updates) == (10, 35, 9)
    assert (figures.skipped_steps, figures.broken_images, figures.busy_seconds) == (1, 1, 20.0)


def test_what_a_killed_launch_lost_is_counted_once(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "a/0000")
    save(ledger, "a/0000", 4, images=16)
    skip(ledger, "a/0000", 3)
    skip(ledger, "a/0000", 6)
    ledger.append("broken", chunk="a/0000", epoch=0, step=7, global_step=7, keys=["k"], reasons=["truncated"])
    start(ledger, "a/0000", global_step=4, resumed_from="chunks/a/0000/state-4", plan="p2", devices="1 x cpu")

    before = chunk_records(ledger.lines)["a/0000"]
    ledger.append("broken", chunk="a/0000", epoch=0, step=7, global_step=7, keys=["k"], reasons=["truncated"])
    save(ledger, "a/0000", 8, images=31)

    assert (before.skipped, before.broken, before.images_trained) == (1, 0, 16)
    after = chunk_records(ledger.lines)["a/0000"]
    assert (after.skipped, after.broken, after.images_trained) == (1, 1, 31)
    assert (after.plan_digests, after.devices) == (("p1", "p2"), ("2 x cpu", "1 x cpu"))


def test_resuming_from_an_older_state_takes_that_states_counts(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "a/0000")
    save(ledger, "a/0000", 4, images=16)
    save(ledger, "a/0000", 8, images=32)
    start(ledger, "a/0000", global_step=4, resumed_from="chunks/a/0000/state-4")  # the state of step 8 is damaged

    assert chunk_records(ledger.lines)["a/0000"].last_state.global_step == 4
    assert totals(ledger.lines).images_seen == 16


def test_a_rollback_names_the_steps_to_pass_over(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "a/0000")
    save(ledger, "a/0000", 4, images=16)
    skip(ledger, "a/0000", 5)
    skip(ledger, "a/0000", 6)
    place = {"from_global_step": 6, "global_step": 4, "path": "x", "pass_over": [5, 6]}
    ledger.append("rolled_back", chunk="a/0000", **place, reason="not_finite")

    assert chunk_records(ledger.lines)["a/0000"].skipped == 0
    assert steps_to_pass_over(ledger.lines, "a/0000") == {5, 6}
    assert steps_to_pass_over(ledger.lines, "a/0000", reason="not_finite") == {5, 6}
    assert steps_to_pass_over(ledger.lines, "a/0000", reason="loss_spike") == frozenset()
    assert steps_to_pass_over(ledger.lines, "a/0001") == frozenset()


def test_the_parent_is_the_last_done_chunk_that_is_not_superseded(tmp_path):
    ledger = open_ledger(tmp_path)
    for position, chunk in enumerate(["a/0000", "a/0001", "a/0002"]):
        start(ledger, chunk, position=position, parent=parent_of(ledger.lines, chunk), global_step=10 * position)
        save(ledger, chunk, 10 * position + 10, images=40, event="chunk_done")

    assert parent_of(ledger.lines, "a/0003") == "a/0002"
    assert parent_of(ledger.lines, "a/0001") == "a/0002"  # trained again, it would start from there

    chunks = chunks_since(ledger.lines, "a/0001")
    ledger.append("superseded", chunks=chunks, reason="captions were wrong")

    assert chunks == ["a/0001", "a/0002"]
    records = chunk_records(ledger.lines)
    assert [name for name, record in records.items() if record.status == "done"] == ["a/0000"]
    assert parent_of(ledger.lines, "a/0001") == "a/0000"
    assert totals(ledger.lines).global_step == 10
    assert chunk_records(ledger.lines)["a/0002"].status == "superseded"

    start(ledger, "a/0001", position=1, parent="a/0000", global_step=10)
    assert chunk_records(ledger.lines)["a/0001"].status == "running"
    assert chunk_records(ledger.lines)["a/0001"].images_trained == 0


def test_a_chunk_that_is_trained_again_goes_on_from_the_run_s_newest_state_and_keeps_its_counts(tmp_path):
    ledger = open_ledger(tmp_path)
    for position, chunk in enumerate(["a/0000", "a/0001"]):
        start(ledger, chunk, position=position, parent=parent_of(ledger.lines, chunk), global_step=10 * position)
        skip(ledger, chunk, 10 * position + 3)
        save(ledger, chunk, 10 * position + 10, images=36, event="chunk_done")
    ledger.append("extended", epochs=2, chunks=[], global_step=20, reason="data.epochs 1 -> 2")
    assert chunk_records(ledger.lines)["a/0000"].is_done(1)
    assert not chunk_records(ledger.lines)["a/0000"].is_done(2)

    start(ledger, "a/0000", parent=parent_of(ledger.lines, "a/0000"), global_step=20, epochs=2)
    save(ledger, "a/0000", 24, images=52)
    start(ledger, "a/0000", parent=parent_of(ledger.lines, "a/0000"), global_step=24, epochs=2)

    record = chunk_records(ledger.lines)["a/0000"]
    assert record.visits == ((0, 0, None), (1, 20, "a/0001"))
    assert (record.status, record.epochs, record.steps, record.images_planned) == ("running", 2, 20, 80)
    assert (record.images_trained, record.skipped, record.last_state.global_step) == (52, 1, 24)
    assert totals(ledger.lines).global_step == 24
    assert list(chunk_records(ledger.lines)) == ["a/0000", "a/0001"]


def test_a_state_without_its_line_is_recognised(tmp_path):
    ledger = open_ledger(tmp_path)
    start(ledger, "a/0000")
    save(ledger, "a/0000", 4, images=16)

    assert has_state(ledger.lines, "m4")
    assert not has_state(ledger.lines, "m8")
