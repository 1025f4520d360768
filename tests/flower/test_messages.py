from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict

from fedsim.flower import messages as wire
from fedsim.flower.client_app import app
from tests.local_grid import LocalGrid

LocalGrid(app, 1)

ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.array(7, dtype=np.int64),
    np.zeros((0, 3), dtype=np.float64),
    np.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_travels_in_the_very_bytes_of_flowers_own(array: np.ndarray) -> None:
    record = wire.array_record({"a": array})
    ours, theirs = record["a"], Array(array)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.data == theirs.data


@pytest.mark.parametrize("array", [*ARRAYS, np.asfortranarray(np.arange(6.0).reshape(2, 3))])
def test_a_decoded_state_is_fresh_and_writable_whoever_encoded_it(array: np.ndarray) -> None:
    for record in (wire.array_record({"a": array}), {"a": Array(array)}):
        found = wire.state_of(record)["a"]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        assert found.flags.writeable
        found[...] = 1
        assert np.array_equal(wire.state_of(record)["a"], array)


@pytest.mark.parametrize("array", [*ARRAYS, np.asfortranarray(np.arange(6.0).reshape(2, 3))])
def test_arrays_of_a_message_are_viewed_without_a_copy(array: np.ndarray) -> None:
    seen = wire.view_of(Array(array))
    assert (seen.dtype, seen.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(seen, array)
    assert not seen.flags.owndata
    assert not seen.flags.writeable


def test_a_replys_telemetry_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def loads(text: str) -> dict[str, int]:
        parsed.append(text)
        return {"partition": 7}

    monkeypatch.setattr(wire.json, "loads", loads)
    content = wire.reply_content(
        wire.array_record({"a": ARRAYS[0]}), 3, {"loss": 0.5, "telemetry": "{}"}
    )
    reply = wire.Reply.of(Message(content, dst_node_id=1, message_type="train"))
    other = copy.copy(wire.Reply.of(reply))
    other.content = RecordDict({**reply.content, wire.ARRAYS: wire.array_record({})})
    assert wire.Reply.of(other).telemetry == {"partition": 7}
    assert (other.state, other.metrics[wire.NUM_EXAMPLES]) == ({}, 3)
    assert list(reply.state) == ["a"]
    assert parsed == ["{}"]


def test_what_a_node_holds_travels_there_and_back() -> None:
    def told(*about: object) -> Message:
        return Message(wire.answer_content(*about), dst_node_id=1, message_type="query")

    assert wire.client_told_by(told(3)) == 3
    assert wire.data_told_by(told(3)) is None
    assert wire.data_told_by(told(3, (9, "f0", ("a", "b")))) == (9, "f0", ["a", "b"])
