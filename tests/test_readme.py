"""The README keeps its word: its commands parse, its targets exist, its lists are complete."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from conftest import ROOT

import compare
import evaluate
import main_stage1
import main_stage2
import predict
from datasets import AUGMENTATIONS, DATASETS, INPUTS, SAMPLERS, prepare
from datasets.longtail import class_sizes
from datasets.published import CLASS_COUNTS
from losses import LOSSES
from models import BACKBONES, build_model
from retraining.features import FEATURES
from retraining.methods import METHODS
from utils.metrics import GROUPS, group_of
from utils.options import make_parser, parse_typed, published_values

README = (ROOT / "README.md").read_text()
OPTIONS = {
    "main_stage1.py": main_stage1.Options,
    "main_stage2.py": main_stage2.Options,
    "evaluate.py": evaluate.Options,
    "compare.py": compare.Options,
    "predict.py": predict.Options,
}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PUBLISHED_COMMANDS = [
    "python main_stage1.py --imb_ratio 100 --cur_stage stage1",
    "python evaluate.py --imb_ratio 100 --cur_stage stage1",
    "python main_stage2.py --imb_ratio 100 --cur_stage stage2 --label_smooth 0.98",
    "python evaluate.py --imb_ratio 100 --cur_stage stage2",
]
PUBLISHED_FLAGS = """data_dir dataset num_class imb_ratio network epochs batch_size cur_stage lr momentum wd nesterov
finetune_epoch finetune_lr finetune_wd label_smooth pretrained_pth out workers seed gpu""".split()


def test_the_published_commands_come_first() -> None:
    assert [re.sub(" +", " ", command) for command in COMMANDS[:4]] == PUBLISHED_COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[:3] == ["python", "-m", "datasets.prepare"]:
        assert words[3] in (*prepare.READERS, *prepare.OWN) and parse_typed(prepare.Options, words[4:], "", None)
    else:
        script = next(i for i, word in enumerate(words) if word in OPTIONS)
        assert words[0] == "torchrun" or (words[0] == "python" and script == 1)
        flags = words[
            script + 2 if words[script] == "predict.py" else script + 1 :
        ]  # whose first argument is the images
        assert parse_typed(OPTIONS[words[script]], flags, words[script], None) is not None


def test_every_published_flag_exists_under_both_spellings() -> None:
    spellings = {
        name for script, cls in OPTIONS.items() for name in make_parser(cls, script, None)._option_string_actions
    }
    for flag in PUBLISHED_FLAGS:
        assert {f"--{flag}", f"--{flag.replace('_', '-')}"} <= spellings


def test_every_departure_from_a_published_default_is_listed() -> None:
    section = README.split("### Where we depart")[1].split("\n## ")[0]
    for cls in (main_stage1.Options, main_stage2.Options):
        for name in published_values(cls):
            assert f"--{name}" in section


def test_every_data_set_and_network_is_described() -> None:
    for name in (*DATASETS, *BACKBONES, *SAMPLERS, *FEATURES, *LOSSES, *INPUTS, *(set(AUGMENTATIONS) - {"crop_flip"})):
        assert f"`{name}`" in README


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods(name: str) -> None:
    [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    shared = {"finetune_lr", "finetune_wd", "sampler"}
    assert set(re.findall("`--(.*?)`", row)) == set(METHODS[name].options) - shared


@pytest.mark.parametrize("name, n_max", [("cifar100", 500), ("cifar10", 5000), ("digits", 124)])
def test_the_table_of_class_counts(name: str, n_max: int) -> None:
    [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.split("|")]
    for ratio, images, groups in zip((10, 50, 100), cells[3].split(" / "), cells[4].split(", ")):
        counts = class_sizes(n_max, int(cells[2]), ratio)
        assert sum(counts) == int(images.replace(",", ""))
        assert groups == "/".join(str(sum(group_of(n) == group for n in counts)) for group in GROUPS)


@pytest.mark.parametrize("name", prepare.PUBLISHED)
def test_the_tables_of_published_sets(name: str) -> None:
    spec, counts = DATASETS[name], json.loads(CLASS_COUNTS.read_text())[name]["train"]
    [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    groups = "/".join(str(sum(group_of(n) == group for n in counts)) for group in GROUPS)
    assert [cell.strip() for cell in row.split("|")][2:5] == [f"{len(counts):,}", f"{sum(counts):,}", groups]
    for recipe, values in spec.recipes.items():
        [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}`, `{recipe}` |")]
        cells = [cell.strip() for cell in row.split("|")]
        assert f"`{values['network']}`" in cells[2] and cells[3].split()[0] == str(values["epochs"])
        assert [float(cell) for cell in cells[4:7]] == [values[key] for key in ("lr", "batch_size", "wd")]


def test_the_table_of_parameters() -> None:
    for row in re.findall(r"^\| (`resnet.*?)\| (.*?) \|", README, flags=re.MULTILINE):
        for network, millions in zip(re.findall("`(.*?)`", row[0]), row[1].split(", ")):
            with torch.device("meta"):
                count = sum(p.numel() for p in build_model(network, 100).parameters())
            assert count / 1e6 == pytest.approx(float(millions.removesuffix(" M")), rel=0.05), network
