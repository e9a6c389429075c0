"""Whether a concept has learned too little, enough or too much: measured, charted, and said in words.

A run of the recipe `dreambooth` is judged where `preview` and `validation` are due (`every_steps`, `at_chunk_end`), and
once before its first update, for what later measurements are compared with. Charts, per concept:

    verdict/trained/NAME     loss on up to 16 of its trained pictures, each at five fixed timesteps with fixed noise
    verdict/held_out/NAME    the same on pictures of the chunk `concepts/held-out`, if there is one
    verdict/gap/NAME         held-out less trained
    verdict/prior/NAME       the same on class pictures
    verdict/nearest/NAME     likeness of its previews and the training picture nearest to them (`likeness`)
    verdict/sanity_drift     distance of the picture of `dreambooth.sanity_prompt` from the one before the first update

From the curves comes a word per concept (`rule`, with the limits of `verdict.toml`): under, good, over or unknown, with
the reasons, what could not be known, and the wiki's remedies as `--set` lines (`remedies`). It stands in the log, in
`status`, and in verdict.json: with the key of the training picture nearest to each preview, and how like each concept's
previews are to the pictures of the others (`bleed`).

The best state so far is kept whatever `save.keep_states` says: the one with the lowest held-out loss, or the last that
does not read over where nothing is held out. `training export --best` writes it. Only a step that is saved and judged
can be the best: make `validation.every_steps` or `preview.every_steps` a multiple of `save.every_steps`.
"""
