"""Windows in which no tag is cut: `strict_tokens`."""

import pytest

from tests.training.dreambooth.toy_adapters import plain_tokenizer
from training.dreambooth.strict_tokens import tokenize_whole_tags
from training.dreambooth.text import tokenize
from training.stage_c.text import BOS_ID, EOS_ID

TAG = "a girl with a very long blue hat"  # 8 tokens, 9 with its comma


def words(windows):
    """Return the text of each window."""
    tokenizer = plain_tokenizer()
    made = []
    for row in windows.tolist():
        assert row[0] == BOS_ID and EOS_ID in row
        made.append(tokenizer.decode(row[1 : row.index(EOS_ID)]).strip(" ,").replace(" ,", ","))
    return made


def test_a_short_caption_is_the_same_with_and_without():
    for pad_id in (0, EOS_ID):
        one, other = (
            make(plain_tokenizer(), ["rin, a girl, smile", ""], max_tokens=75, pad_id=pad_id)
            for make in (tokenize, tokenize_whole_tags)
        )
        assert one.windows.tolist() == other.windows.tolist()
        assert one.num_tokens.tolist() == other.num_tokens.tolist()


def test_no_tag_is_cut_between_windows_and_none_is_lost_while_there_is_room():
    tags = [f"{TAG} {number}" for number in range(10)]

    made = tokenize_whole_tags(plain_tokenizer(), [", ".join(tags)], max_tokens=150, pad_id=EOS_ID)

    first, second = words(made.windows[0])
    assert [*first.split(", "), *second.split(", ")] == tags
    cut = words(tokenize(plain_tokenizer(), [", ".join(tags)], max_tokens=150, pad_id=EOS_ID).windows[0][:1])
    assert cut[0].split(", ")[-1] not in tags


def test_what_finds_no_window_is_left_out_and_counted():
    tags = [f"{TAG} {number}" for number in range(10)]

    made = tokenize_whole_tags(plain_tokenizer(), [", ".join(tags)], max_tokens=75, pad_id=EOS_ID)

    (kept,) = words(made.windows[0])
    assert kept.split(", ") == tags[:7]
    assert made.num_tokens.tolist() == [75 + 3 * 10]


def test_a_tag_longer_than_a_window_is_left_out_and_the_next_one_is_not():
    made = tokenize_whole_tags(plain_tokenizer(), [f"rin, {'long ' * 80}, smile"], max_tokens=75, pad_id=0)

    assert words(made.windows[0]) == ["rin, smile"]
    assert made.num_tokens.tolist() == [75 + 81]


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"must be one of .* got 100"):
        tokenize_whole_tags(plain_tokenizer(), ["a"], max_tokens=100, pad_id=0)
