"""Averages of checkpoints: the bits that float64 gives, whatever the files are, and verified again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from selfkd.core import averaging
from selfkd.errors import WeightsError


def model(folder: Path, shards: list[dict[str, np.ndarray]]) -> Path:
    folder.mkdir()
    for at, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{at:05d}-of-{len(shards):05d}.safetensors")
    return folder


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_average_is_taken_in_float64_and_rounded_once(tmp_path):
    """0.9 · 1 + 0.1 · 2 = 1.1, of which the nearest fp32 is 1.10000002384…; in fp32 throughout it would be 1.1000001."""
    one = model(tmp_path / "a", [{"w": f32(1.0, -4.0), "b": f32(0.25)}])
    other = model(tmp_path / "b", [{"w": f32(2.0, 6.0), "b": f32(0.5)}])
    averaging.average([(one, 0.9), (other, 0.1)], tmp_path / "out")
    made = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert made["w"].tolist() == [np.float32(1.1), -3.0] and made["b"].tolist() == [np.float32(0.9 * 0.25 + 0.1 * 0.5)]
    assert made["w"].dtype == np.float32


def test_shares_are_divided_by_their_sum_and_one_may_be_negative(tmp_path):
    parts = [model(tmp_path / str(at), [{"w": f32(value)}]) for at, value in enumerate((3.0, 6.0, 12.0))]
    averaging.average([(part, 1) for part in parts], tmp_path / "mean")
    averaging.average([(parts[0], 2.0), (parts[1], -1.0)], tmp_path / "away")
    assert load_file(next((tmp_path / "mean").iterdir()))["w"].tolist() == [7.0]
    assert load_file(next((tmp_path / "away").iterdir()))["w"].tolist() == [0.0]


def test_models_may_be_divided_into_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(averaging, "BLOCK", 3)  # a tensor takes several blocks
    rng = np.random.default_rng(0)
    first, second = ({name: rng.standard_normal((5, 4)).astype(np.float32) for name in ("a", "b", "c")} for _ in range(2))
    one = model(tmp_path / "a", [{"a": first["a"], "b": first["b"]}, {"c": first["c"]}])
    other = model(tmp_path / "b", [second])
    averaging.average([(one, 0.25), (other, 0.75)], tmp_path / "out")
    made = {name: value for path in (tmp_path / "out").iterdir() for name, value in load_file(path).items()}
    for name in first:
        expected = (0.25 * first[name].astype(np.float64) + 0.75 * second[name].astype(np.float64)).astype(np.float32)
        assert np.array_equal(made[name], expected)
    assert averaging.differs([(one, 0.25), (other, 0.75)], tmp_path / "out") == ""
    assert averaging.differs([(one, 0.3), (other, 0.7)], tmp_path / "out") == "a"


def test_one_number_that_was_changed_is_found(tmp_path):
    one, other = (model(tmp_path / name, [{"w": f32(value, 1.0), "v": f32(0.0)}]) for name, value in (("a", 0.0), ("b", 1.0)))
    save_file({"w": f32(0.5, np.nextafter(np.float32(1), np.float32(2))), "v": f32(0.0)}, tmp_path / "m.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "out" / "m.safetensors")
    assert averaging.differs([(one, 1), (other, 1)], tmp_path / "out") == "w"


def test_models_that_are_not_alike_have_no_average(tmp_path):
    one = model(tmp_path / "a", [{"w": f32(1.0)}])
    for name, shard in (
        ("shape", {"w": f32(1.0, 2.0)}),
        ("name", {"v": f32(1.0)}),
        ("kind", {"w": np.array([1.0], np.float16)}),
    ):
        with pytest.raises(WeightsError, match="checkpoints of different models have no average"):
            averaging.average([(one, 1), (model(tmp_path / name, [shard]), 1)], tmp_path / f"out-{name}")


def test_counts_are_taken_over_where_they_are_equal_and_refused_where_not(tmp_path):
    count = np.array([7], np.int64)
    one, same = (model(tmp_path / name, [{"w": f32(1.0), "n": count}]) for name in "ab")
    averaging.average([(one, 1), (same, 1)], tmp_path / "out")
    assert load_file(next((tmp_path / "out").iterdir()))["n"].tolist() == [7]
    other = model(tmp_path / "c", [{"w": f32(1.0), "n": count + 1}])
    with pytest.raises(WeightsError, match="the tensor n differs"):
        averaging.average([(one, 1), (other, 1)], tmp_path / "worse")


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_the_average_of_a_model_with_itself_is_itself(tmp_path_factory, values, share):
    folder = tmp_path_factory.mktemp("m")
    one = model(folder / "a", [{"w": f32(*values)}])
    averaging.average([(one, share), (one, 1 - share)], folder / "out")
    made = load_file(next((folder / "out").iterdir()))["w"]
    assert np.allclose(made, f32(*values), rtol=1e-7, atol=0)


# ---- verified again, against models of other tensors ----

HALVES = {"w": f32(0.5, 1.0), "v": f32(0.0)}


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (HALVES, ""),
        ({**HALVES, "w": f32(0.5)}, "w"),  # its first block is all that it has, and that is right
        ({**HALVES, "w": f32(0.5, 1.0, 9.0)}, "w"),
        ({**HALVES, "w": f32(0.5, 1.0).reshape(2, 1)}, "w"),  # the same bytes
        ({**HALVES, "w": f32(0.5, 1.0).view(np.int32)}, "w"),
        ({"w": HALVES["w"]}, "v"),
        ({**HALVES, "x": f32(0.0)}, "x"),
        ({**HALVES, "v": f32()}, "v"),
    ],
)
def test_a_tensor_of_another_shape_or_kind_or_one_too_many_is_no_average(tmp_path, made, wrong):
    parts = [model(tmp_path / name, [{"w": f32(value, 1.0), "v": f32(0.0)}]) for name, value in (("a", 0.0), ("b", 1.0))]
    assert averaging.differs([(part, 1) for part in parts], model(tmp_path / "made", [made])) == wrong


@pytest.mark.parametrize("other", [{"w": f32(1.0, 2.0)}, {"v": f32(1.0)}, {"w": np.array([1.0], np.float16)}])
def test_what_models_that_are_not_alike_are_said_to_average_to_is_refused(tmp_path, other):
    one = model(tmp_path / "a", [{"w": f32(1.0)}])
    with pytest.raises(WeightsError, match=r"checkpoints of different models have no average: [vw] is"):
        averaging.differs([(one, 1), (model(tmp_path / "b", [other]), 1)], one)


def test_a_file_that_ends_inside_a_tensor_is_named(tmp_path):
    one = model(tmp_path / "a", [{"w": f32(1.0, 2.0)}])
    cut = model(tmp_path / "b", [{"w": f32(1.0, 2.0)}])
    [file] = cut.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="the file ends inside a tensor"):
        averaging.differs([(one, 1), (one, 1)], cut)
