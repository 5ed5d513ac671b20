"""The `hparams` argument: its grammar, the pattern rule, and what is told about mistakes."""

import itertools
import re

import pytest

from stn_fx.errors import InputError, OutOfBoundsError, UnknownHyperparameterError
from stn_fx.hparams import CATALOGUE, Hyperparameter, parse_hparams
from stn_fx.hparams.pattern import is_valid, matches


def names(selections):
    return [(each.entry.name, each.pattern) for each in selections]


def test_plain_names():
    assert names(parse_hparams(" dropout, cutout ,weight_decay")) == [
        ("dropout", None),
        ("cutout", None),
        ("weight_decay", None),
    ]


def test_patterns_and_options():
    dropout, cutout, decay = parse_hparams(
        "dropout@layer4.*(shared, initial=0.1), cutout(length=2..16, holes=1..3, length.initial=8),"
        "weight_decay(scale=.3)"
    )
    assert (dropout.entry.name, dropout.pattern, dropout.shared) == ("dropout", "layer4.*", True)
    assert dropout.overrides["rate"].initial == 0.1
    assert dropout.text == "dropout@layer4.*(shared, initial=0.1)"
    length, holes = cutout.overrides["length"], cutout.overrides["holes"]
    assert (length.low, length.high, length.initial) == (2.0, 16.0, 8.0)
    assert (holes.low, holes.high, holes.initial) == (1.0, 3.0, None)
    assert decay.overrides["coefficient"].scale == 0.3
    assert not decay.shared


@pytest.mark.parametrize("text", ["dropout(low=0.1, high=0.5)", "dropout(rate=0.1..0.5)", "dropout(rate=.1 .. 5e-1)"])
def test_two_ways_to_write_bounds(text):
    (selection,) = parse_hparams(text)
    assert (selection.overrides["rate"].low, selection.overrides["rate"].high) == (0.1, 0.5)


def test_objects_and_strings_say_the_same():
    text = parse_hparams("dropout@a.*(shared, initial=0.2), cutout(length=2..16), weight_decay(discrete=false)")
    objects = parse_hparams(
        [
            Hyperparameter("dropout@a.*", shared=True, initial=0.2),
            Hyperparameter("cutout.length", low=2, high=16),
            Hyperparameter("weight_decay", discrete=False),
        ]
    )
    for one, other in zip(text, objects, strict=True):
        assert (one.entry, one.pattern, one.shared, one.overrides) == (
            other.entry,
            other.pattern,
            other.shared,
            other.overrides,
        )


def test_components_merge_into_one_selection():
    (selection,) = parse_hparams(["cutout", Hyperparameter("cutout.length", initial=5), "cutout.holes(initial=2)"])
    assert {name: override.initial for name, override in selection.overrides.items()} == {"length": 5.0, "holes": 2.0}


def test_one_object_is_enough():
    assert names(parse_hparams(Hyperparameter("dropout"))) == [("dropout", None)]


def test_the_default():
    default = parse_hparams(None)
    assert names(default) == [("dropout", None), ("drop_path", None), ("weight_decay", None)]
    assert [each.required for each in default] == [False, False, True]
    assert all(each.required for each in parse_hparams("dropout,drop_path"))


def test_unknown_names_are_told_together():
    with pytest.raises(UnknownHyperparameterError) as caught:
        parse_hparams("droput, lr, dropout, zzz, weight-decay, dropout.layer1.0, cutout.size")
    message = str(caught.value)
    for part in (
        "did you mean dropout?",
        "zzz: nothing",
        "did you mean weight_decay?",
        "dropout@layer1.0",
        "holes, length",
    ):
        assert part in message
    assert "response of the converged weights" in message
    for entry in CATALOGUE:
        assert entry.name in message


@pytest.mark.parametrize("name", ["lr", "learning_rate", "Learning-Rate", "momentum"])
def test_learning_rates_are_explained(name):
    with pytest.raises(UnknownHyperparameterError, match="cannot be tuned this way"):
        parse_hparams(name)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ("", "nothing to tune"),
        ([], "nothing to tune"),
        ("dropout,,cutout", "empty item"),
        ("dropout,", "empty item"),
        ("dropout(shared", "parenthesis"),
        ("dropout)", "parenthesis"),
        ("dropout(shared)x", "not of the form"),
        ("dropout@", "not a pattern"),
        ("dropout@a..b", "not a pattern"),
        ("dropout(initial)", "has no value"),
        ("dropout(initial=high)", "not a number"),
        ("dropout(initial=1..x)", "not a number"),
        ("dropout(initial=0.1, initial=0.2)", "twice"),
        ("dropout(colour=1)", "not an option of dropout"),
        ("dropout(initial=0.1..0.2)", "not an option of dropout"),
        ("dropout(rate=0.1)", "not an option of dropout"),
        ("cutout(initial=3)", re.escape("holes.initial")),
        ("cutout(width=2..3)", "components: holes, length"),
        ("dropout(initial=true)", "is a bool"),
        ("dropout(shared=2)", "not a boolean"),
        ("dropout(low=0.5, high=0.2)", "not below"),
        ("dropout(initial=nan)", "not finite"),
        ("cutout(shared)", "for all inputs anyway"),
        ("label_smoothing@layer1", "neither a pattern nor 'shared'"),
        ("dropout,dropout", "chosen before"),
        ("dropout@a,dropout@a(shared)", "chosen before"),
        ("cutout(length=1..3),cutout.length(initial=2)", "differ on component length"),
        (["dropout", 3], "neither a string nor a Hyperparameter"),
        (7, "is a int"),
        ([Hyperparameter("dropout(shared)")], "as arguments"),
    ],
)
def test_mistakes(hparams, message):
    with pytest.raises(InputError, match=message):
        parse_hparams(hparams)


def test_initial_outside_given_bounds():
    with pytest.raises(OutOfBoundsError):
        parse_hparams("dropout(low=0.2, initial=0.1)")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer4", "layer4", True),
        ("layer4", "layer4.1.dropout", True),
        ("layer4", "layer41", False),
        ("layer4", "net.layer4", False),
        ("layer*", "layer41.0", True),
        ("layer4.*", "layer4", False),
        ("layer4.*", "layer4.1.dropout", True),
        ("*.drop", "a.drop", True),
        ("*.drop", "a.b.drop", False),
        ("**.drop", "a.b.drop", True),
        ("**.drop", "drop", True),
        ("**.drop", "a.drop.b", True),
        ("**.drop", "a.dropout", False),
        ("a.**.z", "a.z", True),
        ("a.**.z", "a.b.c.z", True),
        ("a.**.z", "b.a.z", False),
        ("*", "", False),
        ("**", "", True),
        ("enc*r.*.at*n", "encoder.3.attn.drop", True),
        ("a+", "aa", False),
    ],
)
def test_the_pattern_rule(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_patterns_agree_with_a_naive_matcher():
    def naive(pattern, name):
        """Every prefix of the name, every expansion of ** into 0 to 3 single stars, segment by segment."""
        for length in range(len(name) + 1):
            choices = [[["*"] * n for n in range(4)] if segment == "**" else [[segment]] for segment in pattern]
            for choice in itertools.product(*choices):
                flat = list(itertools.chain.from_iterable(choice))
                if len(flat) == length and all(p in ("*", n) for p, n in zip(flat, name[:length], strict=True)):
                    return True
        return False

    for pattern in itertools.chain.from_iterable(itertools.product(("a", "b", "*", "**"), repeat=n) for n in (1, 2, 3)):
        for name in itertools.chain.from_iterable(itertools.product("ab", repeat=n) for n in (1, 2, 3)):
            assert matches(".".join(pattern), ".".join(name)) == naive(pattern, name), (pattern, name)


def test_valid_patterns():
    assert all(map(is_valid, ("a", "*", "**.a", "layer4.1", "my-layer.x")))
    assert not any(map(is_valid, ("", ".", "a.", "a..b", "a b", "a(b", "a@b")))
