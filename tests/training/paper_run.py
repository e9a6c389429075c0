"""A run on paper: real plans, ledger, metrics, trace and states, with a few made-up bytes instead of networks."""

from dataclasses import asdict
from pathlib import Path

import torch

from sharding.config import load_config
from training.campaign import read_campaign
from training.chunk_records import chunk_records
from training.config import RunConfig
from training.fork import settings_of
from training.ledger import Ledger
from training.plans import batch_plan
from training.position import Position
from training.recipes.base import SampleResult
from training.records import Records
from training.retention import retain_exports, retain_finals
from training.run_dir import RunDir
from training.start_state import first_position
from training.state import StateSaver, take_snapshot
from training.state_folder import load_state
from training.step_report import StepReport

TENSORS = {"model": {"weight": torch.zeros(2000)}, "optimizer": {"weight.exp_avg": torch.zeros(2000)}}


class PaperRun:
    """A run folder whose chunks are "trained" by `train`. skip: global steps without an update; broken: bad keys."""

    devices = "1 x paper"

    def __init__(
        self, run_toml: Path, root: Path, *overrides: str, skip: tuple[int, ...] = (), broken: tuple[str, ...] = ()
    ):
        self.config = load_config(
            run_toml, RunConfig, ["trackers.tensorboard=false", "trackers.trace=true", "save.every_steps=1", *overrides]
        )
        self.run_dir = RunDir(root)
        root.mkdir(exist_ok=True)
        self.ledger = Ledger.open(self.run_dir.ledger_path, guard=lambda: None)
        self.skip, self.broken = skip, broken
        self.position = Position()
        self.saver = self.new_saver()

    def new_saver(self):
        return StateSaver(
            asynchronous=False, check=lambda: None, keep_last=self.config.save.keep_states,
            on_saved=lambda folder, digest: self.records.state_saved(folder, digest),
        )  # fmt: skip

    def campaign(self):
        data = self.config.data
        return read_campaign(data.workspace, data.chunks, self.run_dir, epochs=lambda _: data.epochs)

    def train_all(self):
        campaign = self.campaign()
        self.run_dir.update_run_json(chunks=list(campaign.names))
        for name in campaign.names:
            if not campaign.is_done(name):
                self.train(name, campaign)

    def train(self, name, campaign):
        number, chunk = campaign.names.index(name), self.run_dir.start_chunk(campaign.chunk(name))
        plans = [
            batch_plan(chunk.read_index(), name, config=settings_of(self.ledger.lines, self.config, name, n), epoch=n)
            for n in range(self.config.data.epochs)
        ]
        position = first_position(self.ledger.lines, name, self.position)
        self.records = Records(self.config, self.run_dir, self.ledger)
        resumed = self.run_dir.final_folder(self.position.chunk) if self.position.chunk else None
        self.records.start_chunk(
            chunk, plans, number=number, position=position, resumed_from=resumed, machine={"devices": self.devices},
            frozen_weights=dict,
        )  # fmt: skip
        digests = [plan.digest for plan in plans]
        for plan in plans[position.epoch :]:
            for step in plan.steps:
                position = self.step(step, position)
                if position.step < len(plan.steps):
                    self.save(self.run_dir.state_folder(name, position.global_step), position, digests)
            position = position.next_epoch()
        final, save = self.run_dir.final_folder(name), self.config.save
        self.save(final, position, digests)
        if save.export_every_chunks and (number + 1) % save.export_every_chunks == 0:
            self.run_dir.weights_folder(name).mkdir(exist_ok=True)
            (self.run_dir.weights_folder(name) / "stage_c.safetensors").write_bytes(bytes(4000))
        self.records.chunk_done(chunk, position, final=final, plan_digests=digests)
        records = chunk_records(self.ledger.lines)
        retain_finals(
            records, self.run_dir, keep_chunks=save.keep_chunks, keep_every_chunks=save.keep_every_chunks,
            trusted=self.saver.trusted,
        )  # fmt: skip
        retain_exports(records, self.run_dir, keep_exports=save.keep_exports)
        self.records.close()
        self.position = position

    def step(self, step, before):
        samples = [sample for micro_batch in step.micro_batches for sample in micro_batch.samples]
        bad = [(sample.key, "truncated") for sample in samples if sample.key in self.broken]
        problem = "not_finite" if before.global_step + 1 in self.skip else ""
        after = before.after_step(num_images=len(samples), num_broken=len(bad), is_applied=not problem, seconds=0.5)
        results = [SampleResult(s.key, "d", "c", 1.0, 1.0, {}) for s in samples if s.key not in self.broken]
        self.records.step_done(StepReport(step, before, after, results, bad, problem, {"network": 1.0}, 1.0, 0.5, 0.0))
        return after

    def save(self, folder, position, digests):
        self.records.before_save()
        facts = {"global_step": position.global_step, "position": asdict(position), "plan_digests": digests}
        self.saver.save(folder, take_snapshot(TENSORS, facts))


def reopened(run, root, *, config=None):
    """Return a run as a later launch finds it in `root`, a copy of its folder or a branch of it."""
    again = object.__new__(PaperRun)
    again.__dict__.update(run.__dict__)
    again.config, again.run_dir = config or run.config, RunDir(root)
    again.ledger = again.run_dir.open_ledger(guard=lambda: None)
    again.saver = again.new_saver()
    records = chunk_records(again.ledger.lines)
    newest = max((one.last_state for one in records.values() if one.status == "done"), key=lambda one: one.global_step)
    again.position = Position(**load_state(root / newest.path).facts["position"])
    return again
