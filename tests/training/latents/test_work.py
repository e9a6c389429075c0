from collections import Counter

import pytest

from sharding.chunk import ChunkError
from sharding.config import ConfigError
from tests.training.chunks import make_chunk
from training.latents.work import chunks_to_encode, require_possible, work_of


@pytest.fixture
def chunks(workspace, make_config, encoders):
    for number in (1, 2):
        name = f"newest/{number:04d}"
        make_chunk(workspace / "chunks" / name, num_samples=8 + number, name=name)
    return chunks_to_encode(make_config(), None)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 30])
def test_every_part_belongs_to_exactly_one_task(chunks, make_config, num_tasks):
    config = make_config()

    owners = Counter(
        (work.name, number)
        for task in range(num_tasks)
        for work in work_of(chunks, config=config, with_text=True, part_index=task, num_parts_of_all=num_tasks)
        for number in work.owned
    )

    latents = {"newest/0000 latents": 5, "newest/0001 latents": 2, "newest/0002 latents": 2}
    assert Counter(name for name, _ in owners) == latents | {
        name.replace("latents", "text"): n for name, n in latents.items()
    }
    assert set(owners.values()) == {1}


def test_every_place_of_a_picture_has_an_owner_when_remainders_move(chunks, make_config):
    config = make_config(
        data={"epochs": 4}, batch={"remainder": "merge", "merge_max_crop_loss": 0.5, "micro_batch_size": 3}
    )

    works = [w for task in range(9) for w in work_of(chunks, config=config, with_text=False, part_index=task,
                                                     num_parts_of_all=9)]  # fmt: skip

    for chunk in chunks:
        own = [work for work in works if work.chunk == chunk]
        assert sorted(n for work in own for n in work.owned) == list(range(own[0].wanted.num_parts))


@pytest.mark.parametrize(("index", "number"), [(2, 2), (-1, 3), (0, 0)])
def test_a_task_that_is_none_is_refused(chunks, make_config, index, number):
    with pytest.raises(ValueError, match=rf"--part-index {index} is outside 0 … {number - 1}"):
        list(work_of(chunks, config=make_config(), with_text=False, part_index=index, num_parts_of_all=number))


def test_chunks_are_chosen_by_name_or_range(chunks, make_config):
    config = make_config()

    def names(**choice):
        return [chunk.name for chunk in chunks_to_encode(config, None, **choice)]

    assert names() == ["newest/0000", "newest/0001", "newest/0002"]
    assert names(chunk_name="newest/0001") == ["newest/0001"]
    assert names(chunks="1:") == ["newest/0001", "newest/0002"]
    with pytest.raises(ConfigError, match="exclude"):
        names(chunk_name="newest/0001", chunks="1:")
    with pytest.raises(ChunkError, match="newest/0007"):
        names(chunk_name="newest/0007")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"crop": "random"}}, 'data.crop "random"'),
        ({"data": {"colour_jitter": {"hue": 0.1}}}, "data.colour_jitter"),
        ({"caption": {"shuffle": True}}, "caption.shuffle: captions change"),
        ({"caption": {"caption_dropout_fraction": 0.1}}, "caption.caption_dropout_fraction"),
        ({"caption": {"token_warmup_steps": 5}}, "caption.token_warmup_steps"),
        ({"caption": {"wildcards": True}}, "caption.wildcards"),
        ({"caption": {"lines": "random"}}, "caption.lines"),
        ({"caption": {"tag_dropout_groups": {"rest": 0.5}}}, "caption.tag_dropout_groups"),
        ({"caption": {"mix": {"tags": 1.0}}}, "caption.mix"),
        ({"stage_c": {"train_text_encoder": True}}, "stage_c.train_text_encoder"),
        ({"stage_c": {"image_embedding_fraction": 0.1, "image_encoder": "x"}}, "stage_c.image_embedding_fraction"),
    ],
)
def test_what_has_no_single_latent_or_text_output_is_refused_with_the_reason(make_config, changes, message):
    config = make_config(latents={"use": False}, **changes)

    with pytest.raises(ConfigError, match=message):
        require_possible(config, with_text=True)
    with pytest.raises(ValueError, match=f"latents.(use|text): {message}"):
        make_config(latents={"use": True, "text": True}, **changes)


def test_changing_captions_do_not_matter_to_latents_alone(make_config):
    require_possible(make_config(caption={"shuffle": True}), with_text=False)
