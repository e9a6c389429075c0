"""Make a W&B workspace that groups a run's charts as TensorBoard's Custom Scalars tab does.

    pip install wandb-workspaces
    wandb login                                         # or WANDB_API_KEY
    python configs/wandb/workspace.py ENTITY PROJECT    # from the checkout; prints the address of the view

ENTITY is your user or team, PROJECT what `trackers.wandb_project` says. Offline runs: `wandb sync` first, in the order
of the launches. Run it again after an update of this project; older views stay, delete them in the browser. `--print`
shows the charts and sends nothing. Tried with wandb-workspaces 0.4.13 up to what it would send; never on a W&B server.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from training.chart_layout import GROUPS


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """Return the view: a section for each group, its charts over the global step."""
    sections = [
        workspaces.Section(
            name=group,
            is_open=number == 0,
            panels=[
                reports.LinePlot(title=title, x="global_step", metric_regex="|".join(patterns))
                for title, patterns in charts.items()
            ],
        )
        for number, (group, charts) in enumerate(GROUPS.items())
    ]
    return workspaces.Workspace(entity=entity, project=project, name="chunkline", sections=sections)


def main() -> None:
    """Make the view, or show it."""
    parser = argparse.ArgumentParser(description="Make a W&B workspace for chunkline's charts.")
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--print", action="store_true", dest="is_dry")
    options = parser.parse_args()
    made = workspace(options.entity, options.project)
    if not options.is_dry:
        print(made.save().url)
        return
    for section in made.sections:
        print(section.name)
        for panel in section.panels:
            print(f"  {panel.title}: {panel.metric_regex}")


if __name__ == "__main__":
    main()
