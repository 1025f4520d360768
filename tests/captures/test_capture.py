from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.captures.gradients import Gradients
from fedsim.captures.sketch import LARGEST_SKETCH, Sketch
from fedsim.core.capture import parse_form
from tests.captures.chosen import chosen, policy


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("none", []),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("first:1", [0]),
        ("first:3", [0, 1, 2]),
        ("first:9", [0, 1, 2, 3, 4, 5, 6]),
        ("last:1", [6]),
        ("last:3", [4, 5, 6]),
        ("last:7", [0, 1, 2, 3, 4, 5, 6]),
        ("last:9", [0, 1, 2, 3, 4, 5, 6]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6]),
        ("every:2", [0, 2, 4, 6]),
        ("every:3", [0, 3, 6]),
        ("every:7", [0]),
        ("every:100", [0]),
        ("sketch:1", [0, 1, 2, 3, 4, 5, 6]),
        ("sketch:4096", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_of_seven_steps_a_policy_keeps_these(text, kept):
    assert list(policy(text).kept_steps(7)) == kept


COUNTED = ("first", "last", "every", "sketch")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["none", "all", *COUNTED]), st.integers(1, 50), st.integers(0, 120))
def test_kept_steps_are_ascending_steps_of_the_round(name, count, length):
    text = f"{name}:{count}" if name in COUNTED else name
    capture = policy(text)
    kept = capture.kept_steps(length)
    assert list(kept) == sorted(set(kept) & set(range(length)))
    assert str(capture) == text
    if name in ("first", "last"):
        assert len(kept) == min(count, length)
        assert kept == (range(length)[:count] if name == "first" else range(length)[-count:])
    if name == "every":
        assert list(kept) == [step for step in range(length) if step % count == 0]


def test_parse_reads_the_k():
    assert policy("first:12") == Gradients(steps="first", count=12)
    assert policy("last:2") == Gradients(steps="last", count=2)
    assert policy("sketch:4096") == Sketch(count=4096, seed=42)
    assert policy("every:5", ["fc.*"]) == Gradients(steps="every", count=5, layers=("fc.*",))


def test_parse_hands_on_the_form_of_what_is_kept():
    plain = policy("all")
    assert (plain.layers, plain.dtype, plain.encoding) == (("*",), "float32", "support")
    made = policy("all", ["a", "b"], "bfloat16", "dense")
    assert (made.layers, made.dtype, made.encoding) == (("a", "b"), "bfloat16", "dense")


def test_nothing_and_figures_of_steps_are_no_files():
    kept = {t: policy(t).keeps_files for t in ("none", "all", *(f"{n}:3" for n in COUNTED))}
    assert kept == {"none": False, **dict.fromkeys(list(kept)[1:], True)}
    assert [c.keeps_files for c in chosen("none")] == [False, False]


def test_a_sketch_has_a_million_numbers_at_most_and_steps_have_no_bound():
    assert policy("sketch:1048576").count == LARGEST_SKETCH == 2**20
    with pytest.raises(ValueError, match="a sketch to 1,048,576"):
        parse_form("sketch:1048577")
    assert policy("last:1048577").kept_steps(3) == range(3)


@pytest.mark.parametrize(
    "text",
    [
        *("", "All", "some", "none:", "none:1", "all:", "all:1", "all:3", " all", "all "),
        *("first", "first:", "first:0", "first:-1", "first:+1", "first:1.5", "first:x"),
        *("first: 1", "first:1 ", "first:²", "first:٣", "First:1"),
        *("last", "last:", "last:0", "every", "every:", "every:0", "every:1:2"),
        *("sketch", "sketch:", "sketch:0", "sketch:-1", "sketch:1e3", "sketches:3", ":3"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_allowed_ones(text):
    with pytest.raises(ValueError) as caught:
        parse_form(text)
    assert str(caught.value) == (
        "none, all, first:K, last:K, every:K or sketch:K with K from 1, a sketch to 1,048,576"
    )


NAMES = ["conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("globs", "kept"),
    [
        (["*"], NAMES),
        (["fc.*"], ["fc.weight", "fc.bias"]),
        (["fc"], []),
        (["*.bias"], ["layer1.0.bn1.bias", "fc.bias"]),
        (["fc.bias", "conv1.weight"], ["conv1.weight", "fc.bias"]),
        (["*", "fc.*"], NAMES),
        (["layer?.0.bn[12].bias"], ["layer1.0.bn1.bias"]),
        (["FC.*"], []),
        (["c.weight"], []),
    ],
)
def test_globs_match_whole_names_and_keep_the_models_order(globs, kept):
    assert policy("all", globs).layers_of(NAMES) == kept
