"""Identity is content: what does not change the meaning does not change a digest, and what does, does."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core import digest
from selfkd.core.pool import shape

CELLS = {
    "id": st.text(min_size=1, max_size=4),
    "text": st.none() | st.text(max_size=6),
    "token_ids": st.none() | st.lists(st.integers(0, 9), max_size=3),
    "logprob": st.none() | st.floats(-9, 0),
    "teacher_messages": st.none()
    | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=3)}), max_size=2),
}
ROWS = st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=6, unique_by=lambda row: row["id"])


@given(ROWS, st.randoms())
def test_the_order_of_rows_and_columns_does_not_count(rows, random):
    frame = shape("samples", rows)
    shuffled = frame[random.sample(range(frame.height), frame.height)].select(random.sample(frame.columns, len(frame.columns)))
    assert digest.table(frame, ("id",)) == digest.table(shuffled, ("id",))


@given(ROWS, ROWS)
def test_two_tables_have_one_digest_only_if_they_are_equal(left, right):
    a, b = shape("samples", left).sort("id"), shape("samples", right).sort("id")
    assert (digest.table(a, ("id",)) == digest.table(b, ("id",))) == a.equals(b)


def test_a_null_is_not_an_empty_text_nor_an_empty_list_nor_a_zero():
    def of(**cells: object) -> str:
        return digest.table(shape("samples", [{"id": "a", **cells}]), ("id",))

    assert len({of(), of(text=""), of(token_ids=[]), of(token_ids=[0]), of(logprob=0.0), of(teacher_messages=[])}) == 6


@given(ROWS)
def test_a_column_that_is_null_everywhere_counts_as_not_there(rows):
    frame = shape("samples", rows)
    grown = frame.with_columns(entropy=pl.lit(None, pl.Float64))
    assert digest.table(grown, ("id",)) == digest.table(frame, ("id",))
    used = grown.with_columns(entropy=pl.when(pl.int_range(pl.len()) == 0).then(0.5))
    assert digest.table(used, ("id",)) != digest.table(frame, ("id",))


@given(ROWS.filter(lambda rows: len(rows) > 1), st.randoms())
def test_the_order_of_rows_with_equal_keys_does_not_count(rows, random):
    frame = shape("samples", [{**row, "id": "same"} for row in rows])
    shuffled = frame[random.sample(range(frame.height), frame.height)]
    for keys in (("id",), ("id", "stream"), ()):
        assert digest.table(frame, keys) == digest.table(shuffled, keys)


def test_rows_with_equal_keys_still_mean_what_they_say():
    one = shape("samples", [{"id": "a", "text": "x", "tokens": 1}, {"id": "a", "text": "y", "tokens": 2}])
    other = shape("samples", [{"id": "a", "text": "x", "tokens": 2}, {"id": "a", "text": "y", "tokens": 1}])
    assert digest.table(one, ("id",)) != digest.table(other, ("id",))


def test_the_parquet_writer_does_not_count(tmp_path):
    frame = shape("samples", [{"id": str(i), "text": "x" * i} for i in range(50)])
    frame.write_parquet(tmp_path / "a.parquet", compression="zstd")
    frame.write_parquet(tmp_path / "b.parquet", compression="uncompressed", row_group_size=7)
    a, b = (digest.table(pl.read_parquet(tmp_path / name), ("id",)) for name in ("a.parquet", "b.parquet"))
    assert a == b and digest.file(tmp_path / "a.parquet") != digest.file(tmp_path / "b.parquet")


def model(folder: Path, tensors: dict[str, bytes], **config: object) -> Path:
    folder.mkdir()
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors.values()))
    (folder / "config.json").write_text(json.dumps({"hidden": 2, **config}))
    return folder


def test_weights_are_their_tensors_and_not_their_file_layout(tmp_path):
    one = model(tmp_path / "one", {"a": b"12", "b": b"345"}, transformers_version="1")
    two = model(tmp_path / "two", {"b": b"345", "a": b"12"}, transformers_version="2")
    assert digest.weights(one) == digest.weights(two)


@pytest.mark.parametrize("change", [{"a": b"13", "b": b"345"}, {"a": b"123", "b": b"45"}, {"a": b"12", "c": b"345"}])
def test_any_changed_tensor_changes_the_weights(tmp_path, change):
    assert digest.weights(model(tmp_path / "one", {"a": b"12", "b": b"345"})) != digest.weights(model(tmp_path / "two", change))


@pytest.mark.parametrize("block", [1, 3, 1 << 22])
def test_one_reading_gives_the_digest_and_the_hash_of_each_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(digest, "READ_BYTES", block)
    folder = model(tmp_path / "one", {"a": b"1234567", "empty": b"", "b": b"89"})
    shard = folder / "model.safetensors"
    shard.rename(folder / "first.safetensors")
    shard.write_bytes(
        (model(tmp_path / "two", {"c": b"xyz"}) / "model.safetensors").read_bytes() + b"more, after the last tensor"
    )
    found, files = digest.weights_and_files(folder)
    assert found == digest.weights(folder)
    assert files == {path: digest.file(path) for path in folder.glob("*.safetensors")} and len(files) == 2


def test_a_tensor_without_bytes_may_be_listed_behind_its_neighbour(tmp_path):
    between, behind = ({"a": b"12", "empty": b"", "b": b"34"}, {"a": b"12", "b": b"34", "empty": b""})
    one, two = model(tmp_path / "one", between), model(tmp_path / "two", behind)
    shard = two / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"[4, 4]", b"[2, 2]"))
    assert b'[2, 4]}, "empty": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]' in shard.read_bytes()
    assert digest.weights(one) == digest.weights(two)


def test_a_file_whose_tensors_overlap_is_refused(tmp_path):
    folder = model(tmp_path / "one", {"a": b"12", "b": b"34"})
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"[2, 4]", b"[1, 3]"))
    with pytest.raises(ValueError, match="two tensors share bytes"):
        digest.weights(folder)


TEXTS = {
    "tokenizer_config.json": ('{"add_bos_token": true}', '{"add_bos_token": false}'),
    "special_tokens_map.json": ('{"eos_token": "</s>"}', '{"eos_token": "<end>"}'),
    "added_tokens.json": ('{"<a>": 7}', '{"<a>": 8}'),
    "generation_config.json": ('{"eos_token_id": 2}', '{"eos_token_id": [2, 3]}'),
    "vocab.json": ('{"a": 1}', '{"a": 2}'),
    "vocab.txt": ("a\nb\n", "b\na\n"),
    "merges.txt": ("a b\n", "b a\n"),
    "tokenizer.model": ("one", "two"),
    "spiece.model": ("one", "two"),
    "qwen.tiktoken": ("YQ== 0", "YQ== 1"),
    "chat.json": ('{"fold": true}', '{"fold": true, "end": [6]}'),
    "chat_template.jinja": ("{{ messages }}", "{{ bos_token }}"),
    "chat_templates/tools.jinja": ("{{ messages }}", "{{ tools }}"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_weights_are_also_every_file_that_changes_text(tmp_path, name):
    folder = model(tmp_path / "one", {"a": b"12"})
    found = [digest.weights(folder)]
    (folder / name).parent.mkdir(exist_ok=True)
    for content in TEXTS[name]:
        (folder / name).write_text(content)
        found.append(digest.weights(folder))
    assert len(set(found)) == 3


def test_how_a_text_is_spelled_and_who_wrote_it_does_not_count(tmp_path):
    folder = model(tmp_path / "one", {"a": b"12"})
    (folder / "tokenizer_config.json").write_text('{"a": 1, "b": [2], "transformers_version": "5.1", "name_or_path": "/x"}')
    before = digest.weights(folder)
    (folder / "tokenizer_config.json").write_text('{\n  "b": [2],\n "a": 1, "transformers_version": "6.0"}')
    (folder / "README.md").write_text("hello")
    assert digest.weights(folder) == before


def test_which_version_of_peft_wrote_an_adapter_does_not_count_and_its_rank_does(tmp_path):
    folder = model(tmp_path / "one", {"a": b"12"})
    found = []
    for words in ({"r": 4, "peft_version": "0.18.0"}, {"r": 4, "peft_version": "0.19.1"}, {"r": 8, "peft_version": "0.18.0"}):
        (folder / "adapter_config.json").write_text(json.dumps(words))
        found.append(digest.weights(folder))
    assert found[0] == found[1] != found[2]


def test_weights_of_a_run_made_before_are_held_though_fewer_files_were_covered(tmp_path):
    """The digest as it was: written down when it covered no tokenizer_config.json."""
    folder = model(tmp_path / "one", {"a": b"12"})
    before = digest.weights(folder)  # of the tensor and config.json, which both cover
    (folder / "tokenizer_config.json").write_text("{}")
    assert digest.weights(folder) != before and digest.holds(folder, before) and digest.holds(folder, digest.weights(folder))
    (folder / "config.json").write_text("{}")
    assert not digest.holds(folder, before)


def test_seeds_come_from_names_and_fit_63_bits():
    seeds = {digest.seed(0, 1, "sample", f"prompt-{i}", number, 0) for i in range(100) for number in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert digest.seed("ab", "c") != digest.seed("a", "bc")


def test_a_record_that_was_edited_is_not_intact():
    record = digest.with_self_digest({"a": 1, "notes": {"seconds": 2}})
    assert digest.intact(record) and not digest.intact({**record, "notes": {"seconds": 3}})
