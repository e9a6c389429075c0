"""Every rule of rules.toml is asked somewhere, and every word list read."""

import re
from pathlib import Path

from training.dreambooth.doctor import rules as rules_module
from training.dreambooth.doctor.rules import load_rules

SOURCES = "\n".join(path.read_text() for path in Path(rules_module.__file__).parent.glob("*.py"))


def test_every_rule_is_asked_and_every_word_list_is_read():
    rules = load_rules()

    assert [name for name in rules.rules if f'"{name}"' not in SOURCES] == []
    assert [name for name in type(rules.words).model_fields if not re.search(rf"words\.{name}\b", SOURCES)] == []


def test_every_rule_says_what_the_wiki_says():
    assert [name for name, rule in load_rules().rules.items() if not rule.wiki] == []
