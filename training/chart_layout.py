"""Which charts belong together, for TensorBoard's Custom Scalars tab and W&B workspaces. No torch, no files.

A chart is a list of regular expressions, searched in the names of metrics; what a run does not have stays empty.
"""

GROUPS: dict[str, dict[str, list[str]]] = {
    "Loss": {
        "loss": ["^train/loss$", "^train/loss_average$"],
        "weighted loss": ["^train/weighted_loss$"],
        "gradient norm": ["^train/grad_norm$"],
        "by timestep": ["^loss_by_timestep/"],
        "by data set": ["^loss_by_dataset/"],
        "by bucket": ["^loss_by_bucket/"],
    },
    "Validation": {
        "held out against trained": ["^validation/loss$", "^train/loss_average$"],
        "by timestep": ["^validation/timestep_"],
    },
    "Verdict": {
        "loss on trained and held-out pictures": ["^verdict/trained/", "^verdict/held_out/"],
        "gap": ["^verdict/gap/"],
        "prior": ["^verdict/prior/"],
        "likeness of previews": ["^verdict/nearest/"],
        "drift": ["^verdict/sanity_drift$"],
    },
    "Rates": {"learning rates": ["^lr/"]},
    "Speed": {
        "images per second": ["^speed/images_per_second$"],
        "seconds per step": ["^speed/step_seconds$"],
        "memory": ["^memory/"],
    },
    "Data wait": {
        "share of waiting": ["^data/wait_fraction$"],
        "seconds of waiting": ["^data/wait_seconds$"],
        "broken and skipped": ["^data/broken$", "^train/skipped$", "^train/spike$"],
    },
    "Progress": {
        "shares": ["^progress/chunk_fraction$", "^progress/campaign_fraction$"],
        "hours left": ["^progress/campaign_left_hours$"],
    },
}
