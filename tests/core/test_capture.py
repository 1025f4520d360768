from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.capture import CapturePolicy

LENGTHS = (0, 1, 2, 3, 7, 8, 9, 100)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("none", []),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("first:1", [0]),
        ("first:3", [0, 1, 2]),
        ("first:9", [0, 1, 2, 3, 4, 5, 6]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6]),
        ("every:2", [0, 2, 4, 6]),
        ("every:3", [0, 3, 6]),
        ("every:7", [0]),
        ("every:100", [0]),
    ],
)
def test_of_seven_steps_a_policy_keeps_these(text, kept):
    policy = CapturePolicy.parse(text)
    assert [step for step in range(7) if policy.keeps_step(step)] == kept
    assert policy.count_of(7) == len(kept)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["none", "all", "first", "every"]), st.integers(1, 50))
def test_the_count_is_the_number_of_kept_steps(name, count):
    policy = CapturePolicy.parse(name if name in ("none", "all") else f"{name}:{count}")
    assert policy.steps == name
    for length in LENGTHS:
        assert policy.count_of(length) == sum(policy.keeps_step(n) for n in range(length))


def test_parse_reads_the_k():
    assert CapturePolicy.parse("first:12") == CapturePolicy(steps="first", count=12)
    assert CapturePolicy.parse("every:5", ["fc.*"]) == CapturePolicy(
        steps="every", count=5, layers=("fc.*",)
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "All", "some", "none:1", "all:2", "first", "first:", "first:0", "first:-1"),
        *("first:1.5", "first:x", "every", "every:0", "every:1:2", " all", "last:1"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_allowed_ones(text):
    with pytest.raises(ValueError, match=r"^none, all, first:K or every:K with a whole K of 1"):
        CapturePolicy.parse(text)


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
    assert CapturePolicy.parse("all", globs).layers_of(NAMES) == kept
