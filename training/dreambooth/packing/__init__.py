"""Concepts → chunks: what a run's stages show, how often, with which words; class images among it.

`pack.pack_concepts` does all of it. A picture is read in `pictures`, its words are made in `words`, how often it is
shown in `turns`; `concepts` brings a concept's pictures together, `rows` makes a stage's index rows of them, `samples`
and `chunks` write what changed, `report` says what came of it.
"""
