from __future__ import annotations

from dataclasses import dataclass

import pytest

import main_stage1
import main_stage2
from experiment.options import fill_options
from losses import auto_label_smooth
from retraining.methods import METHODS
from retraining.settings import make_methods
from utils.command import command
from utils.errors import UsageError
from utils.options import Choice, Flag, Number, check, option, parse_typed, published_values, resolve


@dataclass(frozen=True)
class Small:
    some_rate: float = option(0.5, Number(float, 0, 1), "a rate of 50 %", "recipe", published=0.98)
    colour: str = option("red", Choice(("red", "blue")), "a colour", "recipe")
    loud_mode: bool = option(False, Flag(), "loud", "recipe")
    size: int | None = option(None, Number(int, 1), "a size", "data", aliases=("extent_of",))

    def __post_init__(self) -> None:
        check(self)


def typed(*argv: str) -> dict:
    return parse_typed(Small, argv, "small.py", None)


def test_only_what_was_typed_leaves_the_parser() -> None:
    assert typed() == {}
    assert typed("--some_rate", "0.25") == typed("--some-rate=0.25") == {"some_rate": 0.25}
    assert typed("--loud-mode") == {"loud_mode": True} and typed("--no-loud_mode") == typed("--no_loud_mode") == {
        "loud_mode": False
    }
    assert typed("--extent-of", "3") == typed("--extent_of=3") == {"size": 3}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--some_rate", "1.5"], "--some_rate 1.5 [0, 1]"),
        (["--some_rate", "nan"], "--some_rate nan [0, 1]"),
        (["--some_rate=-0.1"], "--some_rate -0.1 [0, 1]"),
        (["--colour", "green"], "--colour green red, blue"),
        (["--size", "2.5"], "--size 2.5 whole number"),
        (["--some_rate", "-1e-5"], "--some_rate -1e-5 [0, 1]"),
        (["--some_rates", "1"], "--some_rates --some_rate"),
        (["--some"], "--some --some_rate"),  # no abbreviations
        (["--size"], "--size expected one argument"),
        (["left", "over"], "left"),
    ],
)
def test_mistakes_are_answered_by_name(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        typed(*argv)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("allowed: ")
    assert all(word in str(caught.value) for word in words.split())


def test_a_message_has_two_lines_whatever_was_typed() -> None:
    assert str(UsageError("--x a\nb", "c\nd")) == "error: --x a b\nallowed: c d"


def test_values_are_checked_when_built() -> None:
    with pytest.raises(UsageError, match="--some_rate 2"):
        Small(some_rate=2)


def test_precedence_and_sources() -> None:  # a layer may be called anything, a file named "default" too
    layers = {"default": {"colour": "blue", "other": 1}, "recipe": {"colour": "red", "some_rate": 0.1}}
    resolved = resolve(Small, {"size": 7}, layers)
    assert resolved.options == Small(some_rate=0.1, colour="blue", size=7)
    assert resolved.sources == {"some_rate": "recipe", "colour": "default", "loud_mode": "default", "size": "typed"}
    assert resolved.describe() == "some_rate 0.1 (recipe); size 7 (typed)"  # red is blue's layer, but so is the default


def test_help_shows_default_published_value_and_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        typed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "a rate of 50 % (default: 0.5; --protocol published: 0.98) [a number in [0, 1]]" in text


def test_command_turns_mistakes_into_a_message_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> None:
        raise UsageError("--x 1", "2")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --x 1\nallowed: 2\n"


PUBLISHED = {  # Label Over-Smooth's released defaults
    main_stage1: {"epochs": 200, "lr": 0.01, "wd": 5e-3, "label_smooth": 0.0, "batch_size": 64},
    main_stage2: {"method": "los", "finetune_epoch": 20, "batch_size": 64},
}
COMMON = {
    "dataset": "cifar100",
    "imb_ratio": 100,
    "network": "resnet34",
    "momentum": 0.9,
    "nesterov": False,
    "out": "output",
}


COMMON_VALUES = {"seed": (0,), "batch_size": (64,), "finetune_epoch": (20,)}


@pytest.mark.parametrize("script", PUBLISHED)
def test_defaults_are_the_published_ones(script) -> None:
    stage = script.__name__.removeprefix("main_")
    options = fill_options(script.Options, {}, stage).options
    for name, value in {**COMMON, **PUBLISHED[script], "cur_stage": stage, "data_dir": "data/"}.items():
        assert getattr(options, name) == value, name
    assert (options.protocol, options.select, options.flip_tta, options.eval_every) == ("honest", "last", False, 10)
    los = METHODS["los"].options()
    assert (los["finetune_lr"], los["finetune_wd"]) == (5e-4, 0.0)


def test_published_protocol() -> None:
    one = fill_options(main_stage1.Options, {"protocol": "published"}, "stage1").options
    two = fill_options(main_stage2.Options, {"protocol": "published", "select": "last"}, "stage2").options
    assert (one.select, one.flip_tta, one.eval_every, one.amp) == ("best_test", True, 1, "off")
    assert (two.select, two.flip_tta, two.eval_every) == ("last", True, 1)  # a typed flag wins
    assert two.features == "replay"
    for published, label_smooth in ((True, 0.98), (False, auto_label_smooth(100))):
        settings = make_methods(["los", "crt"], COMMON_VALUES, [], 100, published=published)
        assert [setting.label_smooth for setting in settings] == [label_smooth, 0.0]
    assert published_values(main_stage1.Options) == {
        "select": "best_test", "flip_tta": True, "eval_every": 1, "amp": "off",
    }  # fmt: skip


def test_a_data_set_brings_its_recipe_and_typed_flags_win() -> None:
    resolved = fill_options(main_stage1.Options, {"dataset": "digits", "lr": 0.3}, "stage1")
    assert (resolved.options.network, resolved.options.epochs, resolved.options.lr) == ("resnet8", 60, 0.3)
    assert resolved.sources["epochs"] == "--dataset digits" and resolved.sources["lr"] == "typed"


def test_a_recipe_wins_over_the_protocol() -> None:
    resolved = fill_options(main_stage1.Options, {"dataset": "digits", "protocol": "published"}, "stage1")
    assert not resolved.options.flip_tta and resolved.sources["flip_tta"] == "--dataset digits"
    assert resolved.options.select == "best_test" and resolved.sources["select"] == "--protocol published"


def test_a_seed_is_drawn_when_none_is_given() -> None:
    seeds = {fill_options(main_stage1.Options, argv, "stage1").options.seed for argv in ({}, {}, {"seed": "None"})}
    assert len(seeds) == 3 and all(isinstance(seed, int) for seed in seeds)
    assert fill_options(main_stage1.Options, {"seed": 7}, "stage1").options.seed == 7


def test_learning_rate_is_an_alias() -> None:
    for spelling in ("--learning-rate", "--learning_rate"):
        assert parse_typed(main_stage1.Options, [spelling, "0.2"], "main_stage1.py", None) == {"lr": (0.2,)}
