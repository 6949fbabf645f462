"""Whatever a program reports is read as one plain value or refused with a reason."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfkd.sandbox import Foreign, Limits, Sandbox, inside, tiers, values

NEEDS_WALLS = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")


def report(text: str, number: int = 7) -> Any:
    return values.read(text.encode("utf-8", "surrogatepass"), number)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the report is not JSON"),
        ("{", "the report is not JSON"),
        ("[" * 100_000, "the report is not JSON"),
        ('{"id":7,"value":' + "9" * 5000 + "}", "the report is not JSON"),
        ('{"id":7,"value":NaN}', "NaN is not JSON"),
        ('{"id":7,"value":1,"value":2}', "a name appears twice in the report"),
        ('{"id":8,"value":1}', "a report for another call"),
        ('{"id":true,"value":1}', "a report for another call"),
        ('{"id":7.0,"value":1}', "a report for another call"),
        ('{"id":7}', "not a report"),
        ('{"id":7,"value":1,"error":"x"}', "not a report"),
        ('{"id":7,"value":1,"passed":true}', "not a report"),
        ('{"id":7,"error":1}', "not a report"),
        ('{"id":7,"value":{}}', "the report holds a value of no known form"),
        ('{"id":7,"value":[]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["q",1]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["l",1]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["l",[],[]]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["d",[[["l",[]],1]]]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["d",[[1]]]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["s",[["l",[]]]]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["i","zz"]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["f","1.5"]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["c",1,"x"]}', "the report holds a value of no known form"),
        ('{"id":7,"value":["b","0"]}', "the report holds a value of no known form"),
        ('{"id":7,"value":' + '["l",[' * 70 + "1" + "]]" * 70 + "}", "the value is nested more than 64 deep"),
    ],
)
def test_a_report_that_is_not_exactly_one_is_malformed(text: str, reason: str) -> None:
    with pytest.raises(values.Malformed) as caught:
        report(text)
    assert str(caught.value) == reason


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["l", "t", "s", "z", "d", "c", "i", "f", "b", "?"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "value", "error", "x"]), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        JSONS.map(lambda one: json.dumps(one).encode()),
        JSONS.map(lambda one: json.dumps({"id": 7, "value": one}).encode()),
    )
)
def test_whatever_arrives_as_a_report_is_a_value_or_a_reason(data: bytes) -> None:
    try:
        values.read(data, 7)
    except (values.Malformed, values.Failed) as reason:
        assert str(reason) or isinstance(reason, values.Failed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=4), st.booleans())
@NEEDS_WALLS
def test_whatever_a_program_writes_on_its_channel_is_a_failure_or_one_value(frames: list[bytes], framed: bool) -> None:
    """Random frames, and random bytes without frames, then a clean end: never a hang, never another exception."""
    data = b"".join(struct.pack(">I", len(one)) + one if framed else one for one in frames)
    program = f"import os\ndef f():\n  os.write(3, {data!r})\n  os._exit(0)"
    with Sandbox(Limits(seconds=2.0)).calls(program) as functions:
        began = time.monotonic()
        returned = functions.call("f")
        assert time.monotonic() - began < 10
        assert returned.ok is False and returned.reason, (frames, returned)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    read = values.read(f'{{"id":1,"value":{inside.encode(value, 0)}}}'.encode(), 1)
    assert read == value and repr(read) == repr(value)


def test_a_foreign_value_is_equal_to_nothing_and_shows_its_type() -> None:
    found = report('{"id":7,"value":["?","numpy.int64"]}')
    assert isinstance(found, Foreign) and found != found and repr(found) == "<numpy.int64>"


def test_hostile_reports_cost_little_and_raise_nothing_else() -> None:
    prime = (1 << 61) - 1
    colliding = (
        b'{"id":1,"value":["s",[' + b",".join(b"%d" % (n * prime) for n in range(40_000) if n * prime < 1 << 63) + b"]]}"
    )
    many = b'{"id":1,"value":["s",[' + b",".join(b'["i","%x"]' % (n * prime) for n in range(20_000)) + b"]]}"
    huge = b'{"id":1,"value":["c",["i","' + b"f" * 400 + b'"],0]}'
    for report in (
        many,
        huge,
        b'{"id":1,"value":["c",true,false]}',
        b'{"id":1,"value":["i"," -0x10 "]}',
        b'{"id":1,"value":["i","1_0"]}',
    ):
        began = time.process_time()
        with pytest.raises(values.Malformed):
            values.read(report, 1)
        assert time.process_time() - began < 2
    assert len(values.read(colliding, 1)) == 5
    with pytest.raises(values.Malformed, match="collide"):  # a quarter of other hashes does not hide them
        members = [*range(4000), *(n * prime for n in range(12_000))]
        values.read(
            b'{"id":1,"value":["s",[%s]]}' % ",".join(f'["i","{n:x}"]' if n >= 1 << 63 else str(n) for n in members).encode(), 1
        )
    for twice in (b'["s",[1,1]]', b'["s",[1,true]]', b'["d",[[1,2],[1,3]]]'):
        with pytest.raises(values.Malformed):
            values.read(b'{"id":1,"value":%s}' % twice, 1)
    with pytest.raises(values.Malformed):
        values.read('{"id":1,"value":1}'.encode("utf-16"), 1)
