"""README.md and docs/ keep their word: commands parse, links lead somewhere, lists are complete, code is right."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import compare
import evaluate
import extract
import predict
import retraining.options
import training.options
from datasets import AUGMENTATIONS, DATASETS, INPUTS, SAMPLERS, prepare
from datasets.longtail import class_sizes
from datasets.published import CLASS_COUNTS
from losses import LOSSES
from models import BACKBONES, build_model
from retraining.features import FEATURES
from retraining.methods import METHODS, Trained
from utils.metrics import GROUPS, group_of
from utils.options import make_parser, parse_typed, published_values, shown, spec_of

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
LINES = TEXT.splitlines()
OPTIONS = {
    "main_stage1.py": training.options.Options,
    "main_stage2.py": retraining.options.Options,
    "evaluate.py": evaluate.Options,
    "compare.py": compare.Options,
    "predict.py": predict.Options,
    "extract.py": extract.Options,
}
#: What docs/options.md calls the commands.
LETTERS = dict(zip(OPTIONS, "12ecpx"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for block in blocks(text, "bash") for line in block.splitlines())
    return [line for line in lines if line]


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


README = PAGES[ROOT / "README.md"]
PUBLISHED_COMMANDS = [
    "python main_stage1.py --imb_ratio 100 --cur_stage stage1",
    "python evaluate.py --imb_ratio 100 --cur_stage stage1",
    "python main_stage2.py --imb_ratio 100 --cur_stage stage2 --label_smooth 0.98",
    "python evaluate.py --imb_ratio 100 --cur_stage stage2",
]
PUBLISHED_FLAGS = """data_dir dataset num_class imb_ratio network epochs batch_size cur_stage lr momentum wd nesterov
finetune_epoch finetune_lr finetune_wd label_smooth pretrained_pth out workers seed gpu""".split()


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1100 and len(README) <= 9000


def test_the_published_commands_come_first() -> None:
    assert [re.sub(" +", " ", command) for command in commands(README)[:4]] == PUBLISHED_COMMANDS


@pytest.mark.parametrize("command", dict.fromkeys(commands(TEXT)))
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        return  # see below
    if words[:3] == ["python", "-m", "datasets.prepare"]:
        assert words[3] in (*prepare.READERS, *prepare.OWN) and parse_typed(prepare.Options, words[4:], "", None)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        script = next(i for i, word in enumerate(words) if word in OPTIONS)
        assert words[0] == "torchrun" or (words[0] == "python" and script == 1)
        flags = words[
            script + 2 if words[script] == "predict.py" else script + 1 :
        ]  # whose first argument is the images
        assert parse_typed(OPTIONS[words[script]], flags, words[script], None) is not None


def test_what_is_made_can_be_made() -> None:
    typed = "\n".join([*blocks(TEXT, "bash"), *blocks(TEXT, "sh"), *re.findall(r"`(make .*?)`", prose(TEXT))])
    targets = set(re.findall(r"^make (?:PYTHON=\S+ )?(\w+)", typed, flags=re.MULTILINE))
    assert {"demo", "test", "check", "gpu", "torture"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page]))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    assert page.parent == ROOT or f"docs/{page.name}" in README  # no page is lost


def test_the_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|json))`", TEXT):
        assert (ROOT / name).is_file() or name.startswith(("data/", "output/")), name
    results = ROOT / "benchmarks" / "results"
    for name in re.findall(r"`((?:cifar100_|reproduce/|\w+_bench|\w+_accuracy|digits_)[\w.-]*\.\w+)`", TEXT):
        assert (results / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_is_at_home_where_it_says(page: Path) -> None:
    """A block of Python begins with the file that it belongs to, among whose names it runs."""
    homes: dict[str, dict[str, object]] = {}
    for block in blocks(PAGES[page], "python"):
        first, _, code = block.partition("\n")
        if first.startswith("import "):  # a program of its own, which tests/test_export.py runs
            continue
        module = re.fullmatch(r"# ([\w/]+)\.py(, in \w+)?", first)
        assert module, first
        name = module[1].replace("/", ".")
        exec(textwrap.dedent(code), homes.setdefault(name, dict(vars(importlib.import_module(name)))))


def test_every_published_flag_exists_under_both_spellings() -> None:
    spellings = {
        name for script, cls in OPTIONS.items() for name in make_parser(cls, script, None)._option_string_actions
    }
    for flag in PUBLISHED_FLAGS:
        assert {f"--{flag}", f"--{flag.replace('_', '-')}"} <= spellings


def test_every_departure_from_a_published_default_is_listed() -> None:
    section = TEXT.split("### Where we depart")[1].split("\n#")[0]
    for cls in (training.options.Options, retraining.options.Options):
        for name in published_values(cls):
            assert f"--{name}" in section


def test_the_tables_of_options() -> None:
    """Every option of every command has a row with its group, its default and the published value, and no other has."""
    page = PAGES[ROOT / "docs" / "options.md"]
    found = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for name, star, letters, default in re.findall(
            r"^\| `--(\w+)`(\*?) \| ([12cepx ]+) \| (.*?) \|", section, flags=re.MULTILINE
        ):
            for letter in letters.split():
                assert (name, letter) not in found, f"--{name} of {letter} is there twice"
                found[name, letter] = section.splitlines()[0].lower(), bool(star), default
    for script, cls in OPTIONS.items():
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, spec in spec_of(cls).items():
            value = "all of them" if spec.several == tuple(METHODS) else shown(spec.several or defaults[name])
            value += f" (published: {spec.published['']})" if spec.published else ""
            assert found.pop((name, LETTERS[script]), None) == (spec.group, spec.sweep, value), f"--{name} of {script}"
    assert not found


def test_the_options_of_prepare_are_described() -> None:
    for name in spec_of(prepare.Options):
        assert f"| `--{name}` |" in PAGES[ROOT / "docs" / "data.md"]


def test_every_data_set_and_network_is_described() -> None:
    for name in (*DATASETS, *BACKBONES, *SAMPLERS, *FEATURES, *LOSSES, *INPUTS, *(set(AUGMENTATIONS) - {"crop_flip"})):
        assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods(name: str) -> None:
    [row] = [line for line in LINES if line.startswith(f"| `{name}` |")]
    defaults = METHODS[name].options()
    own = {key: defaults[key] for key in defaults if key not in Trained.options()}
    values = dict(re.findall(r"`--(\w+)` ([\w.]+)", row))
    assert set(values) == set(re.findall("`--(.*?)`", row)) == set(own)
    for key, default in own.items():
        assert values[key] == (default if isinstance(default, str) else f"{default:g}")
    if "sampler" in defaults:
        lr, wd, sampler = row.split("|")[5].split(",")
        assert (float(lr), float(wd)) == (defaults["finetune_lr"], defaults["finetune_wd"])
        assert sampler.strip() == defaults["sampler"]


@pytest.mark.parametrize("name, n_max", [("cifar100", 500), ("cifar10", 5000), ("digits", 124)])
def test_the_table_of_class_counts(name: str, n_max: int) -> None:
    [row] = [line for line in LINES if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.split("|")]
    for ratio, images, groups in zip((10, 50, 100), cells[3].split(" / "), cells[4].split(", ")):
        counts = class_sizes(n_max, int(cells[2]), ratio)
        assert sum(counts) == int(images.replace(",", ""))
        assert groups == "/".join(str(sum(group_of(n) == group for n in counts)) for group in GROUPS)


@pytest.mark.parametrize("name", prepare.PUBLISHED)
def test_the_tables_of_published_sets(name: str) -> None:
    spec, counts = DATASETS[name], json.loads(CLASS_COUNTS.read_text())[name]["train"]
    [row] = [line for line in LINES if line.startswith(f"| `{name}` |")]
    groups = "/".join(str(sum(group_of(n) == group for n in counts)) for group in GROUPS)
    assert [cell.strip() for cell in row.split("|")][2:5] == [f"{len(counts):,}", f"{sum(counts):,}", groups]
    for recipe, values in spec.recipes.items():
        [row] = [line for line in LINES if line.startswith(f"| `{name}`, `{recipe}` |")]
        cells = [cell.strip() for cell in row.split("|")]
        assert f"`{values['network']}`" in cells[2] and cells[3].split()[0] == str(values["epochs"])
        assert [float(cell) for cell in cells[4:7]] == [values[key] for key in ("lr", "batch_size", "wd")]


def test_the_table_of_parameters() -> None:
    for row in re.findall(r"^\| (`resnet.*?)\| (.*?) \|", TEXT, flags=re.MULTILINE):
        for network, millions in zip(re.findall("`(.*?)`", row[0]), row[1].split(", ")):
            with torch.device("meta"):
                count = sum(p.numel() for p in build_model(network, 100).parameters())
            assert count / 1e6 == pytest.approx(float(millions.removesuffix(" M")), rel=0.05), network
