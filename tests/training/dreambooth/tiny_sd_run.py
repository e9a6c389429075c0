"""Tiny runs of the recipe dreambooth in this process or in several, on toy models and painted pictures."""

from pathlib import Path

from safetensors.torch import load_file

from scripts.tiny_run import TinyRun
from tests.training.dreambooth.test_verdict_run import make_chunk
from training.cli import main
from training.metrics_file import read_metrics
from training.run_dir import RunDir

RUN = """
name = "tiny"
device = "cpu"
[data]
workspace = "{root}/workspace"
chunks = ["concepts/0*"]
workers = 0
[batch]
batch_size = 4
micro_batch_size = 2
[buckets]
resolution = [64, 64]
step = 32
min_side = 32
[optimizer]
learning_rate = 1e-3
[schedule]
name = "constant"
[precision]
autocast = "no"
[save]
every_steps = 2
keep_chunks = 9
export_every_chunks = 0
[trackers]
tensorboard = false
trace = true
[dreambooth]
model = "{model}"
concepts = "{root}/concepts.toml"
{recipe}
"""


class SdRun(TinyRun):
    """A workspace with a chunk for each stage, 4 pictures and 2 class images each, and a run on it."""

    def __init__(self, root: Path, model: Path, recipe: str, *, stages: tuple[str, ...]) -> None:
        super().__init__(root / "run", [])
        root.mkdir(exist_ok=True)
        for number, stage in enumerate(stages, 1):
            name = f"concepts/{number:02d}-{stage}"
            make_chunk(root / "workspace", name, {"rin": 4, "rin/class": 2}, first_key=10 * number)
        (root / "concepts.toml").write_text('[[concepts]]\nname = "rin"\nfolder = "none"\n')
        self.toml, self.dir = root / "run.toml", RunDir(self.root)
        self.toml.write_text(RUN.format(root=root, model=model, recipe=recipe))

    def arguments(self, command, *extra):
        words = [word for one in self.overrides for word in ("--set", one)]
        return [command, str(self.toml), "--run-dir", str(self.root), *words, *extra]

    def here(self, command="run", *extra):
        """Do it in this process; return the exit code."""
        return main(self.arguments(command, *extra))

    def losses(self):
        """Return the loss of each step."""
        return [row["train/loss"] for row in read_metrics(self.dir.metrics_path) if "train/loss" in row]

    def traced(self):
        return [sample for row in self.rows("trace.jsonl") for sample in row["samples"]]

    def final(self, chunk, component):
        """Return the tensors of a component of a chunk's final state."""
        files = sorted(self.dir.final_folder(chunk).glob(f"{component}*.safetensors"))
        return {name: one for file in files for name, one in load_file(file).items()}
