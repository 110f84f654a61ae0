"What a column is taken for: by all of its values, in the form that fits best, wherever they stand in the file."
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.core import DataError
from mlkit.data.columns.base import COLUMN_TYPES, ColumnType, column_type
from mlkit.data.contract import Contract, Feature, contract_rows
from mlkit.data.parts import ingest_table, read_parts
from mlkit.data.scan import Frame, scan_table
from mlkit.data.split import SPLITS, Split
from mlkit.inputs.rows import prepare_rows
from mlkit.sources.registry import open_source

R = np.random.default_rng(0)
LABEL = ["a", "b", "b"]


def csv(tmp_path, text, name="t.csv"):
    "A file as a source."
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(name, tmp_path)


def taken(values, chunk_rows=100_000, **more):
    "As what a column is taken, beside a column of labels."
    s = values if isinstance(values, pl.Series) else pl.Series(values, dtype=pl.String)
    frame = pl.DataFrame({"x": s, "y": (LABEL * len(s))[:len(s)]})
    return scan_table(Frame(frame), target="y", chunk_rows=chunk_rows, **more)[0].inputs[0]


# All values, not the first chunk


def test_zip_codes_that_begin_with_zero_after_row_100_000(tmp_path):
    zips = [f"{10_000 + 7 * i % 20_000}" for i in range(110_000)] + [f"{i:05d}" for i in range(1234, 2234)]
    rows = "\n".join(f"{z},{i % 7},{LABEL[i % 3]}" for i, z in enumerate(zips))
    source = csv(tmp_path, f"zip,n,y\n{rows}\n")
    contract, _ = ingest_table(source, tmp_path / "parts", "y", progress=lambda line: None)
    assert [f.dtype for f in contract.inputs] == ["category", "int64"]
    assert read_parts(tmp_path / "parts").collect()["zip"].to_list() == zips


# the first two chunks; the third; what the column is
LATE = {
    "a code with a zero": (["70001", "70002"], ["01234"], ("category", "")),
    "one code among many": (["70001", "70002"], ["70003"] * 99 + ["01234"], ("category", "")),
    "decimals": (["1", "2"], ["2.5"], ("float64", "")),
    "a decimal comma": (["1", "2"], ["2,5"], ("float64", ",")),
    "thousands that a comma parts": (["1,234", "5,678"], ["1,234,567"], ("float64", ".")),
    "a comma that must be decimal": (["1,234", "5,678"], ["0,5"], ("float64", ",")),
    "a decimal point, and thousands before": (["1.234", "2.345"], ["1.234.567"], ("float64", ",")),
    "a currency": (["5", "7.5"], ["$1,250.00"], ("float64", ".$")),
    "an id that is too long for a float64": (["5", "7"], [str(2**60 + 1)], ("id", "")),
    "words among numbers": (["1", "2"], ["low", "high"], ("category", "")),
    "numbers among words": (["unknown"], ["1"] * 2000, ("int64", "")),
    "a third word": (["yes", "no"], ["perhaps"], ("category", "")),
    "a day beyond the twelfth": (["1/2/2024", "3/4/2024"], ["31/12/2024"], ("datetime", "%d/%m/%Y")),
    "a month at the second place": (["1/2/2024", "3/4/2024"], ["12/31/2024"], ("datetime", "%m/%d/%Y")),
    "another form of dates": (["2024-01-02"], ["31.12.2024", "30.12.2024"], ("category", "")),
    "the first value at all": ([""], ["3", "4"], ("int64", "")),
    "a typing mistake": (["1", "2"], ["3"] * 99 + ["x"], ("int64", "")),
}


@pytest.mark.parametrize("case", LATE)
def test_later_values_count_as_much_as_the_first(case):
    first, last, expected = LATE[case]
    values = (first * 100)[:100] + (last * 100)[:max(50, len(last))]
    f = taken(values, chunk_rows=50)
    assert (f.dtype, f.format) == expected
    whole = taken(values)
    assert (whole.dtype, whole.format) == expected, "chunks must not matter"


def test_small_chunks_are_put_together_before_a_type_is_chosen():
    towns = [f"town {i % 40}" for i in range(2000)]
    class Dribble(Frame):
        def rows(self, chunk_rows=100_000): return self.frame.iter_slices(25)
    frame = pl.DataFrame({"x": towns, "y": (LABEL * 2000)[:2000]})
    assert scan_table(Dribble(frame))[0].inputs[0].dtype == "category"


def test_a_target_that_becomes_a_number_late():
    y = [0, 1] * 200 + list(range(300))
    for chunk_rows in (100, 10_000):
        contract = scan_table(Frame(pl.DataFrame({"x": R.normal(size=700), "y": y})), target="y", chunk_rows=chunk_rows)[0]
        assert (contract.task, contract.target.dtype) == ("regression", "int64")


# The best form


NUMBERS = {
    "plain": (["1", "-2.5", "1e3"], "", [1, -2.5, 1000]),
    "commas between thousands": (["1,234,567", "1,234"], ".", [1_234_567, 1234]),
    "points between thousands": (["1.234.567", "1.234", "5,5"], ",", [1_234_567, 1234, 5.5]),
    "an English price": (["$1,234.50", "$7", "-$3"], ".$", [1234.5, 7, -3]),
    "a German price": (["1.234,50 €", "7 €", "-3 €"], ",€", [1234.5, 7, -3]),
    "a currency's code": (["USD 1,234.50", "USD 7"], ".USD", [1234.5, 7]),
    "spaces": (["1 234,50", "12 345"], ",", [1234.5, 12_345]),
    "narrow spaces": (["1\u202f234,50", "7"], ",", [1234.5, 7]),
    "spaces that do not break": (["1\xa0234,50", "7"], ",", [1234.5, 7]),
    "apostrophes": (["1'234.50", "1’234"], ".", [1234.5, 1234]),
    "lakhs": (["1,23,456.78", "12,345"], ".", [123_456.78, 12_345]),
    "percent": (["12.5%", "7 %", "0"], ".%", [12.5, 7, 0]),
    "percent with a comma": (["12,5 %", "7%"], ",%", [12.5, 7]),
    "parentheses": (["(1,234.5)", "7", "8"], ".()", [-1234.5, 7, 8]),
    "a printed minus": (["−5", "7"], ".", [-5, 7]),
    "dollars in parentheses": (["($1,234.5)", "$7"], ".$()", [-1234.5, 7]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_read_as_people_write_them(case, tmp_path):
    texts, format, values = NUMBERS[case]
    n = 30 // len(texts)
    frame = pl.DataFrame({"x": texts * n, "y": (LABEL * 30)[:n * len(texts)]})
    contract, _ = ingest_table(Frame(frame), tmp_path / "parts", "y")
    f = contract.inputs[0]
    assert (f.dtype, f.format) == ("float64" if format or "." in "".join(texts) else "int64", format), f.why
    assert read_parts(tmp_path / "parts").collect()["x"].to_list() == values * n
    ingest_table(Frame(frame), tmp_path / "parts", contract=contract) # it keeps its own contract


UNCLEAR = {
    "a comma of either kind": (["1,234", "5,678"], "could be decimal"),
    "two currencies": (["$5", "€5", "$6"], "currencies"),
    "percent on some": (["5%", "0.05", "6%", "7"], "percent"),
    "parentheses beside minus signs": (["(5)", "-5", "6"], "parentheses"),
    "points and commas": (["1.5", "2,25"], "decimal comma in others"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_nobody_guesses_where_a_number_could_be_another(case):
    texts, words = UNCLEAR[case]
    f = taken(texts * 20)
    assert f.dtype == "aside" and words in f.why and "kept aside" in f.why


def test_short_numbers_say_what_a_comma_means():
    incomes = [f"{v:,}" for v in R.integers(500, 90_000, 400)]
    assert any("," not in v for v in incomes)
    assert (taken(incomes).dtype, taken(incomes).format) == ("float64", ".")
    assert taken([v for v in incomes if "," in v]).dtype == "aside" # nothing decides


# Whole numbers beyond 2^53


@pytest.mark.parametrize("stored", [pl.String, pl.Int64, pl.UInt64])
def test_ids_one_apart_beyond_2_to_the_53(stored, tmp_path):
    ids = [2**60 + i for i in range(40)]
    frame = pl.DataFrame({"id": pl.Series(ids).cast(stored), "x": [1.5, 2.5] * 20, "y": ["a", "b"] * 20})
    contract, found = ingest_table(Frame(frame), tmp_path / "parts", "y")
    assert contract.inputs[0].dtype == "id" and contract.inputs[0].unique
    assert read_parts(tmp_path / "parts").collect()["id"].to_list() == [str(i) for i in ids]
    owned = contract.model_copy(update={"inputs": (Feature(name="id", dtype="int64", unique=True), contract.inputs[1])})
    breaches, seen = scan_table(Frame(frame), owned)[1:]
    if stored != pl.UInt64:
        assert seen.columns["id"].repeated is None and not [b for b in breaches if b.check == "unique"]


# Names of rows


def shuffled(n=400): return R.permutation(n)


NAMES = {
    "in order": np.arange(400), "shuffled": shuffled(), "from a thousand": 1000 + shuffled(), "with gaps": R.choice(1200, 400, replace=False),
    "backwards": np.arange(400)[::-1], "floats": np.arange(1.0, 401.0), "shuffled floats": shuffled().astype(float),
    "floats with gaps": [None if i % 50 == 0 else float(i) for i in range(400)], "long": 49 * 10**11 + R.choice(10**11, 400),
    "a few twice": np.r_[shuffled(390), np.arange(10)], "uuid": [str(uuid.UUID(int=int(i) << 96)) for i in shuffled()],
    "uuid of groups": [str(uuid.UUID(int=int(i % 40) << 96)) for i in shuffled()], "words": [f"P-{i}" for i in shuffled()],
}
MEASURED = {
    "ages": R.integers(18, 90, 400), "incomes": R.integers(20_000, 200_000, 400), "decimals": R.normal(size=400), "counts": R.poisson(30, 400),
    "dollars": (10 ** R.normal(8, 0.5, 400)).astype(int), "seconds since 1970": 1_700_000_000 + R.choice(10**7, 400, replace=False),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("text", [True, False])
def test_what_names_rows_is_no_feature(case, text):
    s = pl.Series(NAMES[case])
    f = taken(s.cast(pl.String) if text else s)
    assert f.dtype == "id", f.why
    assert "kept aside" in f.why


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("text", [True, False])
def test_measurements_that_hardly_repeat_stay_features(case, text):
    s = pl.Series(MEASURED[case])
    assert taken(s.cast(pl.String) if text else s).dtype in ("int64", "float64")


def test_times_and_targets_are_no_names():
    days = pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 12, 1), "1d", eager=True)
    assert taken(days).dtype == taken(days.cast(pl.String)).dtype == "datetime"
    table = pl.DataFrame({"x": R.normal(size=100), "year": np.arange(1920, 2020), "price": R.permutation(100)})
    contract = scan_table(Frame(table), target="price")[0]
    assert [f.dtype for f in contract.columns] == ["float64", "int64", "int64"] and contract.task == "regression"


# Spellings of 'missing'


def test_a_word_for_missing_may_be_a_class(tmp_path):
    rows = [("None", "EU", "1.5"), ("Insomnia", "NA", "NA"), ("Apnea", "APAC", "2.5"), ("None", "", "3.5")] * 30
    frame = pl.DataFrame(rows, schema=["disorder", "region", "x"], orient="row")
    contract, found = ingest_table(Frame(frame), tmp_path / "parts", "disorder")
    region, x = contract.inputs
    assert contract.target.categories == ("Apnea", "Insomnia", "None") and "'None'" in contract.target.why
    assert region.categories == ("APAC", "EU", "NA") and region.nullable and "'NA'" in region.why
    assert x.dtype == "float64" and x.nullable and "'NA' read as missing" in x.why
    parts = read_parts(tmp_path / "parts").collect()
    assert parts["disorder"].to_list() == [r[0] for r in rows] and parts["region"].null_count() == parts["x"].null_count() == 30
    ingest_table(Frame(frame), tmp_path / "parts", contract=contract)


@pytest.mark.parametrize("values, missing", [
    (["yes", "no", "no", "NA"], 25), (["low", "high", "mid", "None"], 25), (["LOW", "HIGH", "MID", "NULL"], 25), (["M", "F", "F", "NA"], 25),
    (["a b", "c d", "?", "c d"], 25), (["+", "-", "+", "-"], 0), (["Mild", "None", "Severe", "Mild"], 0)])
def test_a_word_for_missing_is_missing_where_it_is_unlike_the_others(values, missing):
    frame = pl.DataFrame({"x": values * 25, "y": ["a", "b"] * 50})
    assert scan_table(Frame(frame))[2].columns["x"].nulls == missing


def test_a_person_says_what_is_not_missing():
    region = Feature(name="x", dtype="category", not_missing=("NA",), nullable=True)
    contract = Contract(task="classification", inputs=(region,), target=Feature(name="y", dtype="category", categories=("None", "b")))
    seen = scan_table(Frame(pl.DataFrame({"x": ["NA", "?"] * 5, "y": ["None", "b"] * 5})), contract)[2]
    assert seen.columns["x"].counts == {"NA": 5} and seen.columns["y"].counts == {"None": 5, "b": 5}


# Nothing left to learn from


ASIDE = {"ids": {"id": R.permutation(60), "key": [f"k{i}" for i in range(60)]}, "names": {"note": [f"the fox {i % 40}" for i in range(60)]},
         "nothing": {"a": [None] * 60, "b": [""] * 60}}


@pytest.mark.parametrize("case", ASIDE)
def test_a_table_of_which_nothing_is_left(case, tmp_path):
    pl.DataFrame(ASIDE[case] | {"y": ["a", "b"] * 30}).write_csv(tmp_path / "t.csv")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([Path(sys.executable).parent / "mlkit", "new", "p", "--from", "t.csv", "--target", "y"], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1 and len(lines) == 1 and "t.csv: every column but the target is kept aside" in lines[0], done.stderr
    assert "nothing to learn from" in lines[0] and not (tmp_path / "p").exists()


# The first line


FIRST = {
    "sep=": "sep=;\r\na;b\r\n1;2\r\n", "sep= in capitals": "SEP=,\na,b\n1,2\n", "a comment": "# made by hand\na,b\n1,2\n",
    "comments, and a blank line": "# one, two\n# three\n\na,b\n1,2\n", "a title": "Report\na,b\n1,2\n", "lines of a logger": "Serial;17\nStart;x;y;z\n\na;b\n1;2\n" + "3;4\n" * 9,
    "a separator behind": "a,b,\n1,2,\n", "separators behind": "a,b,,,\n1,2,,,\n", "a separator behind the values": "a,b\n1,2,\n",
    "a separator behind the names": "a,b,\n1,2\n", "a commented header": "# a,b\n1,2\n", "all of it": "sep=;\n# by hand\na;b;\n1;2;\n",
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_line_is_not_always_the_header(case, tmp_path):
    frame = pl.concat(csv(tmp_path, FIRST[case]).rows())
    assert frame.columns == ["a", "b"] and frame.row(0) == ("1", "2")


def test_a_header_longer_than_what_is_looked_at_first(tmp_path):
    names = [f"a_rather_long_name_of_a_column_{i}" for i in range(20_000)]
    text = ",".join(names) + "\n" + ",".join(["1"] * 20_000) + "\n" + ",".join(["2"] * 20_000) + "\n"
    assert len(text) > 1 << 19
    start = time.process_time()
    frame = pl.concat(csv(tmp_path, text).rows())
    assert frame.columns == names and frame.height == 2 and time.process_time() - start < 30


def test_a_value_behind_the_last_column_is_not_lost(tmp_path):
    source = csv(tmp_path, "a,b,\n" + "1,2,\n" * 500 + "3,4,5\n")
    with pytest.raises(ValueError, match="row 501: '5' stands behind the last column"):
        list(source.rows())


# A type of one's own


PLUGIN = '''
from mlkit.data.columns.base import ColumnType

class Isbn(ColumnType):
    "Numbers of books."
    name, what, pattern = "isbn", "an ISBN", r"97[89]-?[0-9]{10}"
'''
SHOW = '''
import json, polars as pl
from mlkit.core import MlkitError
from mlkit.data.contract import contract_rows, load_contract
from mlkit.data.scan import Frame, scan_table
books = pl.DataFrame({"book": [f"978-{10**9 + 7919 * i}" for i in range(60)], "x": [i % 7 for i in range(60)], "y": ["a", "b"] * 30})
try:
    contract, found, _ = scan_table(Frame(books))
    print(json.dumps(contract_rows(contract)[0]))
    wrong = books.with_columns(book=pl.lit("4711"))
    print([str(b) for b in scan_table(Frame(wrong), contract)[1]])
except MlkitError as e:
    print(e)
'''


def plugged(folder, code):
    "What a Python says that has a package with a column type."
    (folder / "isbn_column.py").write_text(code)
    (info := folder / "isbn_column-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: isbn-column\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlkit.columns]\nisbn = isbn_column:Isbn\n")
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).resolve().parents[1]}:{folder}"}
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_column_type_of_a_package(tmp_path):
    shown, found = plugged(tmp_path, PLUGIN)
    assert json.loads(shown) == {"column": "book", "role": "kept aside", "type": "isbn", "why": "an ISBN in the first 60 rows"} | {
        k: v for k, v in json.loads(shown).items() if k in ("range", "categories", "missing")}
    assert "column 'book', row 1: '4711' is not an ISBN (60 of 60 rows)" in found


def test_a_column_type_that_cannot_be_imported(tmp_path):
    line, = plugged(tmp_path, "import nowhere_at_all")
    assert "column type 'isbn': isbn_column:Isbn cannot be imported" in line and "nowhere_at_all" in line and "mend that package" in line


def test_a_column_type_in_one_file():
    @column_type
    class Stars(ColumnType):
        "Ratings such as ★★★."
        name, what, pattern, stored, numeric, feature = "stars", "a rating in stars", "★{1,5}", pl.Int64, True, True

        def read(self, s, f):
            text, faults = super().read(s, f)
            return text.str.len_chars().cast(pl.Int64), faults

    try:
        contract, found, seen = scan_table(Frame(pl.DataFrame({"x": ["★", "★★★", ""] * 20, "n": range(0, 600, 10), "y": ["a", "b"] * 30})))
        assert contract.inputs[0].dtype == "stars" and contract.inputs[0] in contract.features
        assert contract_rows(contract)[0]["type"] == "stars" and seen.medians["x"] == 2
    finally:
        del COLUMN_TYPES["stars"]

OWN = ["split", "n", "name", "label", "content", "index", "len", "count", "literal", "class", "samples", "key", "value", "row", "draw", "golden"]

@pytest.mark.parametrize("target", OWN)
def test_a_column_may_have_any_name(tmp_path, target):
    "Also one that mlkit, Polars or a page would give to a column of its own."
    r = np.random.default_rng(0)
    columns = {name: r.choice(["a", "b", "c"], 400).tolist() if i % 2 else r.normal(size=400).round(3).tolist() for i, name in enumerate(OWN)}
    frame = pl.DataFrame(columns | {target: r.choice(["yes", "no"], 400).tolist()})
    contract, _ = ingest_table(Frame(frame), tmp_path / "parts", target, None, 1000, progress=lambda line: None)
    _, fitted, sizes = prepare_rows(pl.scan_parquet(tmp_path / "parts/*.parquet"), contract, tmp_path / "out", Split(dict(zip(SPLITS, (0.7, 0.15, 0.15)))))
    back = pl.concat([pl.read_parquet(tmp_path / f"out/{s}.parquet") for s in SPLITS]).sort("_row")
    assert set(OWN) <= set(back.columns) and back[target].to_list() == frame[target].to_list()
    assert sum(sizes[s] for s in SPLITS) == 400 and fitted.splits(tmp_path / "out")["samples"].sum() == 400

@pytest.mark.parametrize("name", ["_row", "_draw", "_split", "_golden", "_n"])
def test_a_name_of_our_own_is_refused(tmp_path, name):
    frame = pl.DataFrame({name: range(40), "x": range(40), "y": ["a", "b"] * 20})
    with pytest.raises(DataError, match=f"column '{name}': mlkit uses this name itself; rename it"): ingest_table(Frame(frame), tmp_path / "parts", "y", None, 1000, progress=lambda line: None)
