"""Make the demo's models: real classes, real file formats, toy sizes, random weights.

    python -m scripts.demo_models demo/models

What they tag, score and draw means nothing; they prove the line. Put real paths or hub ids into the configs for the
real thing.
"""

import argparse
import sys
from pathlib import Path

from scripts.demo_models.captioning import make_captioning_models
from scripts.demo_models.stage_c import make_stage_c_models
from sharding.files import write_json

SEED = 20240423
COMPLETE = "models.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_models", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if (folder / COMPLETE).exists():
        print(f"{folder}: the models are there")
        return 0
    made = make_captioning_models(folder / "captioning", seed=SEED) | make_stage_c_models(folder / "stage_c", seed=SEED)
    write_json(folder / COMPLETE, {name: str(path.relative_to(folder)) for name, path in made.items()})
    print(f"{folder}: random weights of toy size, in the real formats: {', '.join(sorted(made))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
