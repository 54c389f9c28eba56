"""Sources: every kind of file gives the same records with their places, and every broken one a line that says where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from upo.data.read import read
from upo.errors import DataError, UpoError

ROWS = [{"prompt": "a", "chosen": "b, c", "rejected": "d\ne", "score": 0.5}, {"prompt": "ä", "chosen": "g", "rejected": "h", "score": 2.0}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, rows: list) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def only_error(path: Path | str) -> str:
    records = [record for _, record in read(path)]
    (error,) = [r for r in records if isinstance(r, DataError)]
    return str(error)


def test_json_lines_carry_their_line_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(ROWS[0]) + "\r\n\n" + json.dumps(ROWS[1]))
    assert list(read(path)) == [(f"{path}:1", ROWS[0]), (f"{path}:3", ROWS[1])]


def test_csv_gives_text_numbers_and_truth_values(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,completion,label,n\n"two\nlines",b,TRUE,1.5\nc,"[{""role"": ""assistant"", ""content"": ""x""}]",false,\n')
    assert list(read(path)) == [
        (f"{path}:2", {"prompt": "two\nlines", "completion": "b", "label": True, "n": 1.5}),
        (f"{path}:4", {"prompt": "c", "completion": [{"role": "assistant", "content": "x"}], "label": False, "n": ""}),
    ]


def test_parquet_and_datasets_hold_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet")) == [(f"{tmp_path}/a.parquet:{i + 1}", row) for i, row in enumerate(ROWS)]
    assert list(read(rows)) == [(f"dataset:{i + 1}", row) for i, row in enumerate(ROWS)]


def test_hub_id_is_loaded_with_its_split_and_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: asked.append((name, split, revision)) or ROWS)
    assert list(read("owner/name:test", revision="abc")) == [("owner/name:test:1", ROWS[0]), ("owner/name:test:2", ROWS[1])]
    list(read("owner/name"))
    assert asked == [("owner/name", "test", "abc"), ("owner/name", "train", None)]


def test_hub_failure_is_one_line_with_the_remedy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise RuntimeError("Bad split: tset.\nAvailable: train, test")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^owner/name:tset: no such file here, and not readable as a hub dataset \(Bad split: tset\.\)\. Check the name"):
        list(read("owner/name:tset"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", "x", "a.txt: unknown kind of file; the name must end in .jsonl"),
        ("a.parquet", "not parquet", "a.parquet: not a readable Parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz: unknown kind of file; the name must end in .jsonl, .json, .ndjson, .parquet, .csv. Unpack it first."),
        ("a.json", "[\n{}]", "a.json:1: a JSON array; one object a line is needed: jq -c '.[]' a.json > a-lines.jsonl"),
        ("a.jsonl", "\n[{}]", "a.jsonl:2: a JSON array; one object a line is needed: jq -c '.[]' a.jsonl > a-lines.jsonl"),  # not into itself
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2: broken CSV"),
        ("a.csv", "a,b,a,b\n1,2,3,4\n", "a.csv:1: the header names a, b more than once; rename or remove one of the columns."),
    ],
)
def test_unreadable_file(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        list(read(path))
    assert f"{tmp_path}/{message}" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for source, message in ((tmp_path / "no.jsonl", "no.jsonl: no such file. Give a .jsonl"), (tmp_path, ": is a folder; name one file in it.")):
        with pytest.raises(DataError) as error:
            read(source)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', ":2: broken JSON (Expecting ',' delimiter at column 15); each line must be one complete JSON object."),
        (b'{"prompt": "x", "chosen": "y", "prompt": "z"}', ':2: the key "prompt" is given twice in one object; remove or rename one.'),
        (b'{"prompt": [{"role": "user", "content": "x", "content": "x"}]}', ':2: the key "content" is given twice in one object'),
        (b"[1]", ":2: each line must be a JSON object with named fields; this is a list."),
        (b"null", ":2: each line must be a JSON object with named fields; this is null."),
        (b'{"a": "\xff"}', ":2: not UTF-8 (invalid start byte at byte 7); save the file as UTF-8."),
        (b"[" * 100_000, ":2: broken JSON (nested too deeply or out of range)"),
    ],
)
def test_bad_line_is_named_and_the_rest_is_read(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert f"{path}{message}" in only_error(path)
    assert [record for _, record in read(path) if isinstance(record, dict)] == [{"a": 1}, {"a": 2}]


def test_csv_texts_stay_texts(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,chosen,rejected,score\n12,7,nan,3\nIs it?,true,"[1, 2]",-inf\n"{x}","[{""role"": ""assistant""}]",1e5,x\n')
    assert [record for _, record in read(path)] == [
        {"prompt": "12", "chosen": "7", "rejected": "nan", "score": 3.0},
        {"prompt": "Is it?", "chosen": "true", "rejected": "[1, 2]", "score": float("-inf")},
        {"prompt": "{x}", "chosen": [{"role": "assistant"}], "rejected": "1e5", "score": "x"},
    ]


def test_csv_row_that_is_not_utf8_is_named_wherever_it_stands(tmp_path):
    path = write(tmp_path / "a.csv", b"a,b\n" + b"1,2\n" * 40 + b"1,caf\xe9\n3,4\n")
    assert only_error(path) == f"{path}:42: not UTF-8; save the file as UTF-8."
    assert len(list(read(path))) == 42


def test_parquet_that_is_damaged_inside(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": ["x", "y"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    path = write(tmp_path / "b.parquet", whole[:20] + b"\xff" * 40 + whole[60:])  # its footer is whole
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file \(.+\)\. Write or download it again\."):
        list(read(path))


def test_csv_row_with_too_many_cells(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n")
    assert only_error(path) == f"{path}:3: more cells than the header has columns; quote texts that hold commas."


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_missing_reader_names_the_pip_command(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    source = str(write(tmp_path / name, "x")) if name == "a.parquet" else name
    with pytest.raises(UpoError, match=r'needs (pyarrow|datasets)\. Install it with: pip install "upo\[data\]"'):
        list(read(source))
