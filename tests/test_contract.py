"How data go wrong, and how they merely vary: each way through 'mlkit contract check', with what it must say and how long it may take."
import gzip, json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import cv2, numpy as np, polars as pl, pyarrow as pa
import pytest
from conftest import Project

N = 400 # rows

def people(seed=0, n=N):
    "Patients, as a hospital might deliver them: all text, as CSV has it."
    r, start = np.random.default_rng(seed), datetime(2024, 1, 1, tzinfo=timezone.utc)
    age, sick = r.integers(18, 90, n), r.random(n) < 0.3
    columns = {"id": 1000 + np.arange(n) + 10_000 * seed, "age": age, "height": r.normal(1.7, 0.1, n).round(3), "weight": (r.normal(75, 12, n)).round(1), "temp": np.random.default_rng(seed + 99).normal(15, 3, n).clip(2, 30).round(1),
               "income": r.lognormal(10, 0.4, n).round(2), "town": r.choice(["Bonn", "Köln", "Ulm"], n), "member": r.choice(["yes", "no"], n),
               "visit": [(start + timedelta(hours=int(h))).strftime("%Y-%m-%dT%H:%M:%SZ") for h in r.integers(0, 9000, n)], "sick": np.where(sick, "yes", "no")}
    frame = pl.DataFrame({k: [str(x) for x in v] for k, v in columns.items()})
    return frame.with_columns(income=pl.when(pl.Series(r.random(n) < 0.05)).then(pl.lit("")).otherwise("income"))

def csv(frame, **kw): return frame.write_csv(**kw).encode()

def put(frame, column, row, value):
    "`value` in one cell; the first row below the header is 1."
    return frame.with_columns(pl.when(pl.int_range(pl.len()) == row - 1).then(pl.lit(value)).otherwise(column).alias(column))

@dataclass
class Place:
    "A project that owns the contract of `people()`."
    project: Project

    def check(self, data: bytes | str, name="new.csv", contract="contract.json", *more):
        "What the command says."
        if isinstance(data, bytes): (self.project / name).write_bytes(data)
        done = self.project.mlkit("contract", "check", name, "--contract", contract, *more, rc=None)
        print(f"{done.stderr}{done.stdout}")
        assert "Traceback" not in done.stdout + done.stderr and len((done.stdout + done.stderr).splitlines()) <= 6
        return done

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    p = Project(tmp_path_factory.mktemp("contract"))
    (p / "params.yaml").write_text("ingest:\n  source: people.csv\n  contract: null\n")
    (p / "people.csv").write_bytes(csv(people()))
    env = p.env
    import conftest
    p.__class__ = type("Here", (Project,), {"env": property(lambda self: env | {"PYTHONPATH": str(conftest.ROOT)})})
    p.mlkit("contract", "accept", "people.csv", "--target", "sick")
    contract = p.json("contract.json")
    for f in contract["inputs"]:
        if f["name"] == "id": f["dtype"] = "int64"; f.pop("unique")
    (p / "with_id.json").write_text(json.dumps(contract))
    return Place(p)

new = people(1) # the next delivery
late = (datetime.now(timezone.utc) + timedelta(days=400)).strftime("%Y-%m-%dT%H:%M:%SZ")

# name: (what is delivered, its file's name, the severity of the finding, and words that must be in its one line)
WRONG = {
    "empty": (b"", "new.csv", "stop", ["new.csv", "empty"]),
    "header only": (csv(new[:0]), "new.csv", "stop", ["new.csv", "header but no rows"]),
    "missing column": (csv(new.drop("height")), "new.csv", "stop", ["column 'height'", "missing"]),
    "extra column": (csv(new.with_columns(fax=pl.lit("7"))), "new.csv", "warn", ["column 'fax'", "not in the contract"]),
    "duplicate column": (csv(new).replace(b"weight", b"height", 1), "new.csv", "stop", ["column 'height'", "twice", "columns 3 and 4"]),
    "reordered columns": (csv(new.select("age", "id", *new.columns[2:])), "new.csv", "note", ["column 'age'", "harmless", "by name"]),
    "wrong dtype": (csv(put(new, "age", 7, "old")), "new.csv", "stop", ["column 'age', row 7", "'old' is not a whole number"]),
    "all null": (csv(new.with_columns(weight=pl.lit(""))), "new.csv", "stop", ["column 'weight', row 1", "no value at all"]),
    "half null": (csv(new.with_columns(income=pl.when(pl.int_range(pl.len()) % 2 == 1).then(pl.lit("")).otherwise("income"))), "new.csv", "stop", ["column 'income', row 2", "have no value", "allows 1"]),
    "infinities": (csv(put(new, "height", 9, "inf")), "new.csv", "stop", ["column 'height', row 9", "'inf' is not finite"]),
    "missing labels": (csv(put(put(new, "sick", 5, ""), "sick", 8, "NA")), "new.csv", "stop", ["column 'sick', row 5", "no label (2 of 400 rows)"]),
    "one class": (csv(new.with_columns(sick=pl.lit("no"))), "new.csv", "stop", ["column 'sick'", "only one class, 'no'"]),
    "constant feature": (csv(new.with_columns(height=pl.lit("1.7"))), "new.csv", "warn", ["column 'height', row 1", "the same value in every row (1.7)"]),
    "unseen category": (csv(put(new, "town", 3, "Mainz")), "new.csv", "warn", ["column 'town', row 3", "'Mainz'", "not among"]),
    "duplicate rows": (csv(pl.concat([new, new[10:40]])), "new.csv", "warn", ["row 401: repeats row 11 (30 of 430"]),
    "an id as a feature": (csv(new), "with_id.json", "warn", ["column 'id', row 1", "learn them by heart"]),
    "train/test overlap": (csv(pl.concat([new, people()[5:9].with_columns(id=pl.col("id") + "0")])), "--against", "stop", ["row 401", "people.csv", "4 of 404"]),
    "timestamp in the future": (csv(put(new, "visit", 6, late)), "new.csv", "warn", ["column 'visit', row 6", late, "future"]),
    "mixed time zones": (csv(put(new, "visit", 4, "2024-03-01T12:00:00")), "new.csv", "stop", ["column 'visit', row 4", "no time zone"]),
    "bad UTF-8": (csv(new).replace("Köln".encode(), b"K\xf6ln", 1), "new.csv", "stop", [f"line {new['town'].to_list().index('Köln') + 2}, column 'town'", "0xf6", "UTF-8"]),
    "UTF-16 cut in the middle": (csv(new).decode().encode("utf-16")[:-1001], "new.csv", "stop", ["new.csv", "utf-16", "cut short"]),
    "truncated gzip": (gzip.compress(csv(new))[:-2000], "new.csv.gz", "stop", ["new.csv.gz, line ", "gzip", "fetch it again"]),
    "ragged CSV": (csv(new).replace(b",yes\n", b"\n", 1), "new.csv", "stop", ["line ", "9 fields where the header has 10", "column 'sick'"]),
    "1e308": (csv(put(new, "weight", 11, "1e308")), "new.csv", "stop", ["column 'weight', row 11", "1e308", "too large"]),
    "a negative age": (csv(put(new, "age", 12, "-5")), "new.csv", "stop", ["column 'age', row 12", "'-5' is outside 0 to"]),
    "a 10 MB string": (csv(put(new, "town", 13, "x" * 10_000_000)), "new.csv", "stop", ["row 13, column 'town'", "10,000,000 bytes"]),
    "a unit off by 1000": (csv(new.with_columns((pl.col("weight").cast(pl.Float64) * 1000).cast(pl.String))), "new.csv", "stop", ["column 'weight', row 1", "the unit seems to be off by "]),
}

@pytest.mark.parametrize("way", WRONG)
def test_ways_that_data_go_wrong(place, way):
    data, name, severity, words = WRONG[way]
    more = ("--against", "people.csv") if name == "--against" else ()
    done = place.check(data, name if name.startswith("new") else "new.csv", name if name.endswith(".json") else "contract.json", *more)
    judged = 4 if "breaks the contract" in done.stderr else 1 # 1: what cannot be read at all was not judged
    assert done.returncode == (judged if severity == "stop" else 0)
    lines = [l for l in (done.stderr if severity == "stop" else done.stdout).splitlines() if all(w in l for w in words)]
    assert len(lines) == 1 and lines[0].startswith((f"{severity}: ", "mlkit: ")[:1 + (severity == "stop")]), (done.stdout, done.stderr)
    other = [l for l in (done.stdout + done.stderr).splitlines() if l.startswith(("stop: ", "warn: ")) and l not in lines]
    assert not other, other # one fault, one finding

def jpegs(folder, n=6):
    for c in ("a", "b"):
        (folder / c).mkdir(parents=True)
        for i in range(n): cv2.imwrite(str(folder / c / f"{i}.jpg"), np.random.default_rng(i + 10 * (c == "b")).integers(0, 256, (16, 16, 3), np.uint8))

def test_a_corrupt_jpeg(place, tmp_path):
    jpegs(tmp_path / "photos")
    (place.project / "images.json").write_text(json.dumps({"modality": "image", "task": "classification", "inputs": [{"name": "image", "dtype": "uint8", "shape": [16, 16, 3]}], "target": {"name": "label", "dtype": "category", "categories": ["a", "b"]}}))
    assert place.check(str(tmp_path / "photos"), str(tmp_path / "photos"), "images.json").returncode == 0
    jpeg = tmp_path / "photos/b/3.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:40])
    done = place.check(str(tmp_path / "photos"), str(tmp_path / "photos"), "images.json")
    assert done.returncode == 4 and "stop: 1 of 12 images cannot be decoded: b/3.jpg" in done.stderr

def parquet(frame, tmp, **kw):
    frame.write_parquet(tmp / "x.parquet", **kw)
    return (tmp / "x.parquet").read_bytes()

def typed(frame):
    return frame.with_columns(pl.col("id", "age").cast(pl.Int64), pl.col("height", "weight").cast(pl.Float64), pl.col("income").cast(pl.Float64, strict=False),
        pl.col("visit").str.to_datetime("%Y-%m-%dT%H:%M:%SZ").dt.replace_time_zone("UTC"), member=pl.col("member") == "yes")

# name: (function of a folder that gives the file's bytes, its file's name)
HARMLESS = {
    "the next delivery": (lambda t: csv(new), "new.csv"),
    "CRLF": (lambda t: csv(new, line_terminator="\r\n"), "new.csv"),
    "every field quoted": (lambda t: csv(new, quote_style="always"), "new.csv"),
    "no newline at the end": (lambda t: csv(new).rstrip(b"\n"), "new.csv"),
    "blank lines at the end": (lambda t: csv(new) + b"\n\n", "new.csv"),
    "TSV": (lambda t: csv(new, separator="\t"), "new.tsv"),
    "semicolons": (lambda t: csv(new, separator=";"), "new.csv"),
    "gzip": (lambda t: gzip.compress(csv(new)), "new.csv.gz"),
    "gzip in two members": (lambda t: gzip.compress(csv(new)[:5000]) + gzip.compress(csv(new)[5000:]), "new.csv.gz"),
    "whole numbers as floats": (lambda t: csv(new.with_columns(pl.col("age") + ".0")), "new.csv"),
    "scientific notation": (lambda t: csv(put(new, "weight", 2, "7.25e+01")), "new.csv"),
    "extra whitespace": (lambda t: csv(new.with_columns(pl.format(" {} ", "town").alias("town"), pl.format("  {}", "age").alias("age"))), "new.csv"),
    "whitespace in the header": (lambda t: csv(new).replace(b"age,height", b" age , height", 1), "new.csv"),
    "spellings of null": (lambda t: csv(put(put(put(new, "income", 3, "NA"), "income", 5, "null"), "income", 7, " N/A ")), "new.csv"),
    "spellings of yes and no": (lambda t: csv(put(put(new, "member", 3, "TRUE"), "member", 5, "N")), "new.csv"),
    "unicode in a name": (lambda t: csv(new).replace(b"age,", b"age,", 1).decode().encode("utf-8"), "新 données.csv"),
    "commas in quotes": (lambda t: csv(put(new, "town", 400, "Ulm")).replace(b",Ulm,", b',"Ulm",'), "new.csv"),
    "thousands of a second": (lambda t: csv(put(new, "visit", 3, "2024-03-01 12:00:00.250+00:00")), "new.csv"),
    "another offset, said": (lambda t: csv(put(new, "visit", 3, "2024-03-01T14:00:00+02:00")), "new.csv"),
    "leading BOM": (lambda t: b"\xef\xbb\xbf" + csv(new), "new.csv"),
    "uppercase ending": (lambda t: csv(new), "NEW.CSV"),
    "a slightly larger range": (lambda t: csv(put(new, "age", 3, "97")), "new.csv"),
    "one copy": (lambda t: csv(pl.concat([new, new[3:4]])), "new.csv"),
    "more rows": (lambda t: csv(pl.concat([new, people(2), people(3)])), "new.csv"),
    "fewer rows": (lambda t: csv(new[:250]), "new.csv"),
    "Parquet, typed": (lambda t: parquet(typed(new), t), "new.parquet"),
    "Parquet, zstd": (lambda t: parquet(typed(new), t, compression="zstd"), "new.parquet"),
    "Parquet, snappy, small row groups": (lambda t: parquet(typed(new), t, compression="snappy", row_group_size=50), "new.PARQUET"),
    "Parquet, single precision": (lambda t: parquet(typed(new).with_columns(pl.col("height", "weight", "income").cast(pl.Float32), pl.col("age").cast(pl.Int16)), t), "new.parquet"),
    "Parquet, categoricals": (lambda t: parquet(typed(new).with_columns(pl.col("town", "sick").cast(pl.Categorical)), t), "new.parquet"),
    "Parquet, all text": (lambda t: parquet(new, t), "new.parquet"),
    "JSON lines": (lambda t: typed(new).with_columns(visit=new["visit"]).write_ndjson().encode(), "new.jsonl"),
    "zstd": (lambda t: pa.compress(csv(new), codec="zstd", asbytes=True), "new.csv.zst"),
    "a file called .txt": (lambda t: csv(new, separator="|"), "new.txt"),
    "a temperature below zero": (lambda t: csv(put(new, "temp", 3, "-4")), "new.csv"),
    "UTF-16 with its mark": (lambda t: csv(new).decode().encode("utf-16"), "new.csv"),
    "sep=; of Excel": (lambda t: b"sep=;\r\n" + csv(new, separator=";"), "new.csv"),
    "comments before the header": (lambda t: b"# exported on 2024-03-01, by hand\n#\n" + csv(new), "new.csv"),
    "lines of a report before the header": (lambda t: b"Patients of 2024\n\n" + csv(new), "new.csv"),
    "a separator behind every line": (lambda t: csv(new).replace(b"\n", b",\n"), "new.csv"),
}

@pytest.mark.parametrize("way", HARMLESS)
def test_variations_that_harm_nothing(place, tmp_path, way):
    make, name = HARMLESS[way]
    done = place.check(make(tmp_path), name)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == f"{name}: keeps the contract contract.json\n"

def test_decimal_commas(place):
    "As a spreadsheet in much of Europe writes it: numbers stay numbers, and what is none is named."
    german = new.with_columns(pl.col("height", "weight").str.replace(".", ",", literal=True), pl.col("income").map_elements(lambda v: f"{float(v):,.2f}".translate(str.maketrans(",.", ".,")) if v else "", pl.String))
    (place.project / "german.csv").write_bytes(csv(german, separator=";"))
    shown = place.project.mlkit("contract", "show", "german.csv", "--target", "sick").stdout
    assert sum("decimal comma" in l and "float64" in l for l in shown.splitlines()) == 3, shown

def test_the_lists_are_as_long_as_promised():
    assert len(WRONG) + 1 == 28 and len(HARMLESS) >= 20

def test_order_of_columns_in_parquet_is_only_a_note(place, tmp_path):
    done = place.check(parquet(typed(new).select(reversed(new.columns)), tmp_path), "new.parquet")
    assert done.returncode == 0 and done.stderr == "" and [l.split(":")[0] for l in done.stdout.splitlines()] == ["note", "new.parquet"]
