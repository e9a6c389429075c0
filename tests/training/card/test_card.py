"""The model card: the seed's tables from a run with the seed's numbers, and sums that are the ledger's."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from sharding.chunk import ChunkInfo
from sharding.config import ConfigError, DatasetConfig, load_config
from sharding.schema import Workspace
from tests.training.conftest import make_chunk
from tests.training.paper_run import PaperRun
from training.campaign import read_campaign
from training.card import card as card_module
from training.card.card import read_facts, render_card
from training.card.dataset import WordCounts, count_words
from training.card.hours import hours_lines
from training.card.notes import read_notes
from training.card.settings import base_model
from training.card.status import chunk_status
from training.chunk_records import totals
from training.cli import main
from training.config import RunConfig
from training.config.lora import LoraConfig
from training.device_times import device_times
from training.ledger import Ledger
from training.machine import command_line
from training.run_dir import RunDir

ROOT = Path(__file__).parents[3]
SIZES = {
    "newest": (1848331, 232), "recent": (1380630, 173), "mid": (993227, 125), "early": (566152, 71),
    "oldest": (160397, 21), "pixiv": (343614, 43), "visual novel cg": (231358, 29), "anime wallpaper": (104790, 14),
}  # fmt: skip
WORDS = {
    "aesthetic": {
        "extremely aesthetic": 125451, "very aesthetic": 887382, "aesthetic": 1049857, "slightly aesthetic": 1643091,
        "not displeasing": 569543, "not aesthetic": 445188, "slightly displeasing": 341424, "displeasing": 237660,
        "very displeasing": 328712,
    },
    "quality": {
        "best quality": 1270447, "high quality": 498244, "great quality": 351006, "medium quality": 366448,
        "normal quality": 368380, "bad quality": 279050, "low quality": 538958, "worst quality": 1955966,
    },
    "rating": {"general": 1416451, "sensitive": 3447664, "nsfw": 427459, "explicit nsfw": 336925},
}  # fmt: skip
LICENCE = ["save.model_card.license=other", "save.model_card.license_name=faipl-1.0-sd"]
SEED = """\
pipeline_tag: text-to-image
license: other
license_name: faipl-1.0-sd
license_link: LICENSE
decoder:
- Disty0/sotediffusion-wuerstchen3-alpha1-decoder
# SoteDiffusion Wuerstchen3
# Release Notes
# UI Guide
## SD.Next
Prompt:
Negative Prompt:
Refiner Steps: 10
## ComfyUI
# Code Example
pip install diffusers
from diffusers import StableCascadeCombinedPipeline
model = "Disty0/sotediffusion-wuerstchen3-alpha1-decoder"
pipe = StableCascadeCombinedPipeline.from_pretrained(model, torch_dtype=dtype)
pipe.prior_pipe = pipe.prior_pipe.to(device, dtype=dtype)
## Training Status:
**GPU used for training**: 1x AMD RX 7900 XTX 24GB
**GPU Hours**: 100
| dataset name | training done | remaining |
|---|---|---|
| **newest** | 003 | 228 |
| **recent** | 003 | 169 |
| **mid** | 003 | 121 |
| **early** | 003 | 067 |
| **oldest** | 003 | 017 |
| **pixiv** | 003 | 039 |
| **visual novel cg** | 003 | 025 |
| **anime wallpaper** | 003 | 010 |
| **Total** | 32 | 676 |
**Note**: chunks starts from 0 and there are 8000 images per chunk
## Dataset:
**Model used for captioning**: SmilingWolf/wd-swinv2-tagger-v3
| dataset name | total images | total chunk |
|---|---|---|
| **newest** | 1.848.331 | 232 |
| **recent** | 1.380.630 | 173 |
| **mid** | 993.227 | 125 |
| **early** | 566.152 | 071 |
| **oldest** | 160.397 | 021 |
| **pixiv** | 343.614 | 043 |
| **visual novel cg** | 231.358 | 029 |
| **anime wallpaper** | 104.790 | 014 |
| **Total** | 5.628.499 | 708 |
**Note**:
- Smallest size is 1280x600 | 768.000 pixels
## Tags:
Model is trained with random tag order but this is the order in the dataset if you are interested:
aesthetic tags, quality tags, date tags, custom tags, rating tags, character, series, rest of the tags
### Date:
| tag | date |
|---|---|
| **newest** | 2022 to 2024 |
| **recent** | 2019 to 2021 |
| **mid** | 2015 to 2018 |
| **early** | 2011 to 2014 |
| **oldest** | 2005 to 2010 |
### Aesthetic Tags:
**Model used**: shadowlilac/aesthetic-shadow-v2
| score greater than | tag | count |
|---|---|---|
| **0.90** | extremely aesthetic | 125.451 |
| **0.80** | very aesthetic | 887.382 |
| **0.70** | aesthetic | 1.049.857 |
| **0.50** | slightly aesthetic | 1.643.091 |
| **0.40** | not displeasing | 569.543 |
| **0.30** | not aesthetic | 445.188 |
| **0.20** | slightly displeasing | 341.424 |
| **0.10** | displeasing | 237.660 |
| **rest of them** | very displeasing | 328.712 |
### Quality Tags:
| score greater than | tag | count |
|---|---|---|
| **0.980** | best quality | 1.270.447 |
| **0.900** | high quality | 498.244 |
| **0.750** | great quality | 351.006 |
| **0.500** | medium quality | 366.448 |
| **0.250** | normal quality | 368.380 |
| **0.125** | bad quality | 279.050 |
| **0.025** | low quality | 538.958 |
| **rest of them** | worst quality | 1.955.966 |
## Rating Tags
| tag | count |
|---|---|
| **general** | 1.416.451 |
| **sensitive** | 3.447.664 |
| **nsfw** | 427.459 |
| **explicit nsfw** | 336.925 |
## Custom Tags:
| dataset name | custom tag |
|---|---|
| **image boards** | date, |
| **pixiv** | art by Display_Name, |
| **visual novel cg** | Full_VN_Name (short_3_letter_name), visual novel cg, |
| **anime wallpaper** | date, anime wallpaper, |
## Training Parameters:
**Base model**: Disty0/sote-diffusion-cascade-alpha0
### Command:
## Limitations and Bias
### Bias
### Limitations
## License"""
"""The lines of the seed's card that are no prose, in its order. Its own total of what remains, 682, is a slip: the rows
are 676, and 32 + 676 = 708."""


def simulate_seed(root):
    """Write chunk.json of 708 chunks, and the ledger of a run that has trained chunks 0 to 3 of each data set."""
    chunks, run_dir = Workspace(root / "workspace").chunks, RunDir(root / "run")
    run_dir.root.mkdir()
    for name, (num_images, num_chunks) in SIZES.items():
        for number in range(num_chunks):
            chunk, count = f"{name}/{number:04d}", 8000 if number < num_chunks - 1 else num_images - 8000 * number
            info = ChunkInfo(chunk, count, (), "index.parquet", "", "default", "default", "", 0)
            (chunks / chunk).mkdir(parents=True)
            (chunks / chunk / "chunk.json").write_text(json.dumps(asdict(info)))
            run_dir.chunk_folder(chunk).mkdir(parents=True)
            counts = {"datasets": {name: count}, "periods": {name: count}, "showings": count}
            run_dir.complete_path(chunk).write_text(json.dumps({"counts": counts}))
    ledger = Ledger.open(run_dir.ledger_path, guard=lambda: None)
    for number, chunk in enumerate(f"{name}/{wave:04d}" for wave in range(4) for name in SIZES):
        ledger.append(
            "started", chunk=chunk, position_in_run=number, parent=None, chunk_digest="", plan_digest="", epochs=1,
            steps=500, images_planned=8000, global_step=500 * number, resumed_from=None,
            devices="1 x AMD RX 7900 XTX 24GB",
        )  # fmt: skip
        ledger.append(
            "chunk_done", chunk=chunk, path="final", manifest_digest="", epoch=1, step=0,
            global_step=500 * number + 500, images_trained=8000, applied_updates=500, busy_seconds=360_000 / 32,
        )  # fmt: skip
    (root / "LICENSE").write_text("faipl")
    run_dir.config_path.write_text(f"""
name = "sotediffusion-wr3"
[data]
workspace = "{root}/workspace"
chunks = {json.dumps([f"{name}/*" for name in SIZES])}
[save]
export_formats = ["original", "diffusers"]
hub_prior = "Disty0/sotediffusion-wuerstchen3-alpha1"
hub_decoder = "Disty0/sotediffusion-wuerstchen3-alpha1-decoder"
licence_files = ["{root}/LICENSE"]
model_card = {{ license = "other", license_name = "faipl-1.0-sd", license_link = "LICENSE" }}
[[preview.prompts]]
text = "very aesthetic, best quality, newest,"
negative = "very displeasing, worst quality, oldest, monochrome, sketch, realistic,"
width = 1024
height = 1536
steps = 40
guidance = 8.0
[stage_c]
network = "Disty0/sote-diffusion-cascade-alpha0"
text_encoder = "none"
effnet = "none"
previewer = "none"
""")
    return run_dir


def test_the_card_of_a_run_with_the_seeds_numbers_has_the_seeds_lines_in_its_order(tmp_path, monkeypatch):
    run_dir = simulate_seed(tmp_path)
    monkeypatch.setattr(card_module, "count_words", lambda chunks, groups: WordCounts(WORDS, (1280, 600)))
    (tmp_path / "notes.md").write_text("# SoteDiffusion Wuerstchen3\nAnime finetune.\n## Bias\n- For anime.\n")
    dataset = ROOT / "configs" / "datasets" / "sotediffusion.toml"

    code = main([
        "card", "--run-dir", str(run_dir.root), "--notes", str(tmp_path / "notes.md"), "--dataset", str(dataset),
        "--output", str(tmp_path / "README.md"),
    ])  # fmt: skip

    assert code == 0
    lines = [line.strip() for line in (tmp_path / "README.md").read_text().splitlines()]
    rest = iter(lines)
    missing = [line for line in SEED.splitlines() if line not in rest]
    assert missing == [], f"not there, or not in this order: {missing[0]!r}"
    tables = [line for line in lines if line.startswith("|")]
    own = [line for line in tables if line not in SEED.splitlines()]
    assert own[0] == "| dataset name | images trained | images remaining | total images |"
    assert own[-1] == "| **Total** | 256.000 | 5.372.499 | 5.628.499 |"
    assert len(own) == 3 + len(SIZES)


def numbers(line):
    return [int(cell.replace(".", "")) for cell in line.strip("| ").split(" | ")[1:]]


@pytest.fixture
def run(tmp_path, run_toml):
    """Three chunks made/*, two of them trained, one by another kind of machine."""
    make_chunk(tmp_path / "workspace", 2)
    run = PaperRun(run_toml, tmp_path / "run", "data.chunks=['made/000[01]']", "save.model_card.license=openrail++")
    run.train_all()
    return run


def with_all(run):
    return run.config.model_copy(update={"data": run.config.data.model_copy(update={"chunks": ("made/*",)})})


def test_totals_of_the_tables_are_those_of_the_ledger(run):
    config = with_all(run)

    facts = read_facts(config, run.run_dir.root)
    text = render_card(config, facts)

    sums = totals(run.ledger.lines)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run.run_dir)
    [chunks, images, sizes] = [line for line in text.splitlines() if line.startswith("| **Total**")]
    assert numbers(chunks) == [sum(campaign.is_done(name) for name in campaign.names), 1] == [2, 1]
    assert numbers(images) == [sums.images_seen, 4, 12]
    assert numbers(sizes) == [12, 3]
    assert sum(time.seconds for time in facts.times) == sums.busy_seconds
    assert "| **made** | 001 | 001 |" in text
    assert f"global step {sums.global_step}: 8 images seen in {sums.applied_updates} updates" in text
    rows = [numbers(line) for line in text.splitlines() if line.startswith(("| **cats**", "| **dogs**"))]
    assert [sum(column) for column in zip(*rows, strict=True)] == [8, 4, 12]


def test_a_chunk_that_is_trained_and_deleted_from_the_workspace_still_counts(run):
    config, folder = with_all(run), Workspace(run.config.data.workspace).chunks / "made" / "0000"
    before = render_card(config, read_facts(config, run.run_dir.root))

    shutil.rmtree(folder)

    assert render_card(config, read_facts(config, run.run_dir.root)) == before


def test_the_command_of_the_last_launch_is_shown_without_the_webhook():
    words = [
        "run",
        "a b.toml",
        "--set",
        "trackers.webhook=https://x/secret",
        "--set",
        "data.epochs=2",
        "--run-dir",
        "r",
    ]

    one, eight = (command_line(words, num_processes=number) for number in (1, 8))

    assert one == "python -m training run 'a b.toml' --set data.epochs=2 --run-dir r"
    assert eight == "accelerate launch --num_processes 8 -m training run 'a b.toml' --set data.epochs=2 --run-dir r"
    assert command_line(["-q", "tests"], num_processes=1) is None


@pytest.mark.parametrize(
    ("network", "shown"),
    [("owner/name", "owner/name"), ("/data/models/x.safetensors", "x.safetensors"), ("models/x.safetensors",) * 2],
)
def test_the_base_model_is_a_hub_id_or_a_file_name(run, network, shown):
    stage_c = run.config.stage_c.model_copy(update={"network": network})

    assert base_model(run.config.model_copy(update={"stage_c": stage_c})) == shown.rpartition("models/")[2]


def test_same_run_same_card(run):
    config = with_all(run)

    texts = {render_card(config, read_facts(config, run.run_dir.root)) for _ in range(2)}

    assert len(texts) == 1


def started(chunk, step, devices):
    return "started", {
        "chunk": chunk, "position_in_run": 0, "parent": None, "chunk_digest": "", "plan_digest": "", "epochs": 1,
        "steps": 40, "images_planned": 80, "global_step": step, "resumed_from": None, "devices": devices,
    }  # fmt: skip


def saved(chunk, step, seconds, event="state_saved"):
    return event, {
        "chunk": chunk, "path": "x", "manifest_digest": str(step), "epoch": 0, "step": step, "global_step": step,
        "images_trained": step, "applied_updates": step, "busy_seconds": seconds,
    }  # fmt: skip


def test_hours_are_those_of_steps_that_survived_times_the_devices(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", guard=lambda: None)
    for event, fields in (
        started("a/0000", 0, "8 x A100"),
        saved("a/0000", 10, 3600.0),
        saved("a/0000", 20, 7200.0),  # lost: the next launch resumes from step 10
        started("a/0000", 10, "1 x RX 7900"),
        saved("a/0000", 40, 3600.0 + 36_000.0, "chunk_done"),
        started("a/0001", 40, "1 x RX 7900"),
        saved("a/0001", 80, 7200.0, "chunk_done"),
        ("superseded", {"chunks": ["a/0001"], "reason": "rewound"}),
    ):
        ledger.append(event, **fields)

    times = device_times(ledger.lines)

    assert [(time.name, time.seconds, time.hours) for time in times] == [
        ("8x A100", 3600.0, 8.0), ("1x RX 7900", 36_000.0, 10.0)
    ]  # fmt: skip
    assert sum(time.seconds for time in times) == totals(ledger.lines).busy_seconds
    assert hours_lines(times)[1] == "**GPU Hours**: 18 (8 on 8x A100, 10 on 1x RX 7900)"


def test_chunks_that_are_not_the_first_ones_are_named_one_by_one(tmp_path):
    for number in range(6):
        make_chunk(tmp_path, number)
    campaign = read_campaign(tmp_path, ["made/*"], None)

    def status(*done):
        records = dict.fromkeys((f"made/{number:04d}" for number in done), Done())
        [one] = chunk_status(type(campaign)(campaign.names, campaign.chunks, (), records))
        return one.done, one.num_done, one.num_remaining

    assert status() == ("-", 0, 6)
    assert status(0) == ("000", 1, 5)
    assert status(0, 1, 2) == ("002", 3, 3)
    assert status(1, 2, 5) == ("001-002, 005", 3, 3)
    assert status(*range(6)) == ("005", 6, 0)


class Done:
    def is_done(self, epochs):
        return True


def test_without_a_decoder_of_its_own_the_example_does_not_load_the_published_prior(run):
    config = with_all(run)
    save = config.save.model_copy(update={"hub_prior": "me/prior", "export_formats": ("original", "diffusers")})

    text = render_card(config.model_copy(update={"save": save}), read_facts(config, run.run_dir.root))

    assert 'prior = StableCascadePriorPipeline.from_pretrained("me/prior"' in text
    assert "CombinedPipeline" not in text and "## SD.Next" not in text and "decoder:" not in text.split("---")[1]
    compile(text.split("```python\n")[1].split("```")[0], "example", "exec")


def test_merged_weights_of_a_run_with_lora_are_no_adapters(run):
    facts = read_facts(with_all(run), run.run_dir.root)
    save = with_all(run).save.model_copy(update={"export_formats": ("original",)})

    texts = {
        name: render_card(with_all(run).model_copy(update={"save": save, "lora": LoraConfig(formats=(name,))}), facts)
        for name in ("kohya", "merged")
    }

    assert "Adapters for Stable Cascade" in texts["kohya"] and "`models/loras`" in texts["kohya"]
    assert "Finetune of Stable Cascade" in texts["merged"] and "`models/unet`" in texts["merged"]


# --- what must be said ---


def test_without_a_licence_there_is_no_card(run, capsys):
    for given, said in (
        ([], "save.model_card.license: missing; a model card needs one"),
        (["save.model_card.license=other"], 'save.model_card.license_name: missing; license = "other" needs it'),
        (
            [*LICENCE, "save.model_card.license_link=LICENSE"],
            "save.model_card.license_link: 'LICENSE' is a file that no",
        ),
    ):
        sets = [word for one in given for word in ("--set", one)]
        toml = run.run_dir.root.parent / "run.toml"
        assert main(["card", str(toml), "--run-dir", str(run.run_dir.root), *sets]) == 2
        assert said in capsys.readouterr().err
    assert not (run.run_dir.root / "export").exists()


def test_notes_replace_what_people_know_better(run, tmp_path):
    (tmp_path / "notes.md").write_text(
        "# My model\nA hello.\n\n# Release Notes\nNew.\n```\n# no heading\n```\n"
        "## Limitations\n- Hands.\n## License\nMine."
    )
    config = with_all(run)

    text = render_card(config, read_facts(config, run.run_dir.root), notes=read_notes(tmp_path / "notes.md"))

    assert "---\n# My model\nA hello.\n\n# Release Notes\nNew.\n```\n# no heading\n```\n" in text
    assert "### Limitations\n- Hands.\n\n## License\nMine.\n" in text


def test_notes_cannot_say_what_the_ledger_says(tmp_path):
    (tmp_path / "notes.md").write_text("# Mine\n## Training Status:\n| **Total** | 32 | 682 |\n")

    with pytest.raises(ValueError, match=r"line 2: 'Training Status' is no section of the card that people write"):
        read_notes(tmp_path / "notes.md")
    with pytest.raises(FileNotFoundError, match=r"--notes .*none.md: no such file"):
        read_notes(tmp_path / "none.md")


def test_the_webhook_is_in_no_card(run):
    config = with_all(run)
    trackers = config.trackers.model_copy(update={"webhook": "https://hooks.example.org/secret"})

    text = render_card(config.model_copy(update={"trackers": trackers}), read_facts(config, run.run_dir.root))

    assert "secret" not in text


def test_words_and_the_smallest_picture_are_counted_in_the_indexes(tmp_path):
    from sharding.chunk import load_chunk
    from tests.training.chunks import make_chunk as make_tagged

    make_tagged(tmp_path / "newest" / "0000", num_samples=8)

    words = count_words([load_chunk(tmp_path / "newest" / "0000")], ("general", "aesthetic"))

    assert words.by_group["general"] == {**{f"tag{number}": 1 for number in range(8)}, **dict.fromkeys("bcde", 8)}
    assert set(words.by_group) == {"general"}
    assert words.smallest == (96, 96)


def test_a_dry_run_prints_the_card_and_writes_nothing(run, capsys):
    toml = run.run_dir.root.parent / "run.toml"
    before = sorted(run.run_dir.root.rglob("*"))

    assert main([
        "card", str(toml), "--run-dir", str(run.run_dir.root), "--set", "save.model_card.license=mit", "--dry-run",
    ]) == 0  # fmt: skip

    assert re.match(r"---\npipeline_tag: text-to-image\nlicense: mit\n---\n# tiny\n", capsys.readouterr().out)
    assert sorted(run.run_dir.root.rglob("*")) == before


def test_the_preset_of_the_seed_still_has_its_data_sets():
    config = load_config(ROOT / "configs" / "datasets" / "sotediffusion.toml", DatasetConfig)

    assert [source.dataset for source in config.sources.values()][1:] == ["pixiv", "visual novel cg", "anime wallpaper"]


def test_a_licence_with_a_file_that_is_not_there_is_refused(run, tmp_path):
    save = run.config.save.model_copy(update={"licence_files": (tmp_path / "NONE",)})

    with pytest.raises(FileNotFoundError, match=r"save\.licence_files: .*NONE: no such file"):
        render_card(run.config.model_copy(update={"save": save}), read_facts(run.config, run.run_dir.root))
    with pytest.raises(ConfigError, match=r"save\.model_card\.license"):
        plain = RunConfig.model_validate({**run.config.model_dump(), "save": {}})
        render_card(plain, read_facts(run.config, run.run_dir.root))
