"""The doctor: a wiki's rules for DreamBooth data, measured. `examination.examine` runs them; limits: `rules.toml`."""
