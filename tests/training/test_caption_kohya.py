"""compat = "kohya" against a second writing of kohya's rules, made from their description.

It gives all captions that can come out, so that choices and the shuffle are compared without any numbers.
"""

import re
from fractions import Fraction
from itertools import permutations, product

from hypothesis import example, given
from hypothesis import strategies as st

from training.caption_text import CaptionSettings, training_caption
from training.randomness import SampleIdentity

WORDS = st.sampled_from(
    ["a", "b", "cat ear", "d", ", ", ",", ",,", " ", "|||", " ||| ", ";;;", "{x|y}", "{z}", "{{", "}}", "{", "\n"]
)
TEXTS = st.lists(WORDS, max_size=8).map("".join)
AFFIXES = st.sampled_from(["", "pre", "p, q,", "p ||| q", ", s ||| t", "{u|v}"])
SETTINGS = st.fixed_dictionaries(
    {
        "prefix": AFFIXES,
        "suffix": AFFIXES,
        "separator": st.sampled_from([",", ", ", ";"]),
        "keep_separator": st.sampled_from(["", "|||"]),
        "secondary_separator": st.sampled_from(["", ";;;"]),
        "keep_first_tags": st.integers(0, 3),
        "shuffle": st.booleans(),
        "token_warmup_steps": st.sampled_from([0, 10]),
        "token_warmup_min": st.integers(1, 3),
    }
)


def can_become(text, global_step, *, wildcards, **rules):
    """Return every caption that kohya's process_caption can make of a text."""
    if rules["prefix"]:
        text = rules["prefix"] + " " + text
    if rules["suffix"]:
        text += " " + rules["suffix"]
    lines = text.split("\n") if wildcards else [text.split("\n")[0]]
    texts = {chosen for line in lines for chosen in (with_choices(line) if wildcards else [line])}
    captions = set()
    for chosen in texts:
        for caption in reordered(chosen, global_step, rules):
            if rules["secondary_separator"]:
                caption = caption.replace(rules["secondary_separator"], rules["separator"])
            captions.add(caption)
    return captions


def with_choices(line):
    hidden = line.replace("{{", "\0").replace("}}", "\1")
    stretches = re.split(r"\{([^}]+)\}", hidden)
    options = [stretch.split("|") if number % 2 else [stretch] for number, stretch in enumerate(stretches)]
    return {"".join(picked).replace("\0", "{").replace("\1", "}") for picked in product(*options)}


def reordered(text, global_step, rules):
    steps = rules["token_warmup_steps"]
    if not rules["shuffle"] and steps == 0:
        return {text}
    mark, separator = rules["keep_separator"], rules["separator"]
    if mark and mark in text:
        front, flexible, *behind = [
            [tag.strip() for tag in section.split(separator) if tag.strip()] for section in text.split(mark, 2)
        ]
        behind = behind[0] if behind else []
    else:
        tags = [tag.strip() for tag in text.strip().split(separator)]
        front, flexible, behind = tags[: rules["keep_first_tags"]], tags[rules["keep_first_tags"] :], []
    if global_step < steps:
        least = rules["token_warmup_min"]
        share = Fraction(global_step * (len(flexible) - least), steps)
        flexible = flexible[: share.__floor__() + least]
    orders = permutations(flexible) if rules["shuffle"] else [flexible]
    return {", ".join([*front, *order, *behind]) for order in orders}


@given(
    text=TEXTS, settings_=SETTINGS, wildcards=st.booleans(), global_step=st.sampled_from([0, 1, 3, 7, 9, 10, 50]),
    key=st.sampled_from("kl"),
)  # fmt: skip
@example(
    text="1girl, solo ||| stage, microphone ||| best quality", key="k", global_step=0, wildcards=False,
    settings_={
        "prefix": "", "suffix": "", "separator": ",", "keep_separator": "|||", "secondary_separator": "",
        "keep_first_tags": 0, "shuffle": True, "token_warmup_steps": 0, "token_warmup_min": 1,
    },
)  # fmt: skip
def test_every_caption_is_one_that_kohya_can_make(text, settings_, wildcards, global_step, key):
    if settings_["separator"] == ";":
        settings_["secondary_separator"] = ""
    settings = CaptionSettings(
        **settings_, wildcards=wildcards, lines="random" if wildcards else "first", compat="kohya"
    )

    found = training_caption(
        text, None, settings=settings, identity=SampleIdentity(0, 0, "newest/0000", key), global_step=global_step
    )

    assert found in can_become(text, global_step, wildcards=wildcards, **settings_)
