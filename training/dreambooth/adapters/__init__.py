"""Adapters and trained tokens of Stable Diffusion 1, 2 and XL: on its layers, in files, merged, extracted.

`adapters` puts them on a model and takes them out; `names` has presets of layers and what files call them; `files`
reads and writes kohya's and diffusers' layouts, and reads PEFT's; `export` is what a run gives. `merging` and
`extracting` need no run.
"""
