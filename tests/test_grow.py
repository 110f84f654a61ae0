"Data that grow: new files, new rows, new messages come in with the next `mlkit repro`, and no old row changes its split."
import json

import numpy as np, polars as pl
import pytest
from conftest import FULL, ran
from test_kafka import Broker
from test_new import new
from test_source import ask, postgres, s3 # noqa: F401 two are fixtures

def people(n, first=0):
    r = np.random.default_rng(first)
    return pl.DataFrame({"age": r.integers(18, 90, n), "height": r.normal(1.7, 0.1, n).round(6), "town": r.choice(["Bonn", "Köln", "Ulm"], n), "sick": r.choice(["no", "yes"], n)})

@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A table in a folder of files, ingested and split."
    tmp = tmp_path_factory.mktemp("grow")
    (tmp / "people").mkdir()
    people(300).write_csv(tmp / "people/a.csv")
    project, _ = new(tmp / "sick", "--from", tmp / "people", "--target", "sick")
    project.mlkit("repro", "prepare")
    return project

def splits_of(project): return {n: s for s in ("train", "validation", "test") for n in pl.read_parquet(project / f"data/prepared/{s}.parquet", columns=["height", "age"]).rows()}
def drawn(project): return {row[:2]: row[2] for row in pl.read_parquet(project / "data/shards/*.parquet", columns=["height", "age", "_draw"]).rows()} # what decides the split
def shards(project): return pl.read_parquet(project / "data/shards/*.parquet").drop("_row")

def test_files_and_rows(project):
    before, folder = splits_of(project), project.root.parent / "people"
    pl.concat([people(300), people(30, 300)]).write_csv(folder / "a.csv") # it grew
    people(50, 600).write_csv(folder / "A first.csv") # sorts before it
    assert ran(project.mlkit("repro", "prepare").stdout) == ["ingest", "audit", "prepare"]
    after = splits_of(project)
    assert project.json("reports/metrics/ingest.json")["rows"] == 380 and len(after) == 380 and before.items() <= after.items()

def test_a_column_is_gone(project):
    "The contract is inferred, so it does not stop the run; it is said."
    files = sorted((project.root.parent / "people").glob("*.csv"))
    whole = [f.read_bytes() for f in files]
    for f in files: pl.read_csv(f).drop("town").write_csv(f)
    said = project.mlkit("repro", "ingest").stdout
    for f, data in zip(files, whole): f.write_bytes(data)
    assert "not what they were: column 'town' is gone." in said and "'mlkit contract accept'" in said
    assert "column 'town' is new" in project.mlkit("repro", "ingest").stdout

def grows(project, source, add, stage="ingest"):
    "DVC cannot see it: `mlkit repro` looks. What is there comes in, then the 50 rows that `add` adds; then nothing."
    def repro(): done = project.mlkit("repro", stage); return ran(done.stdout), "has changed since" in done.stdout
    splits = {"ingest": drawn, "prepare": splits_of}[stage]
    project.param(ingest__source=source)
    project.mlkit("contract", "accept", "data/contract.json")
    assert "ingest" in repro()[0]
    before = splits(project)
    add(people(50, 2000))
    steps, told = repro()
    assert told and steps[0] == "ingest" # the others may come from the cache: another source held the same rows
    after = splits(project)
    assert len(before) == 300 and len(after) == 350 and before.items() <= after.items()
    assert repro() == ([], False)

OWN = """#| export
from mlkit.sources.base import Source, source

@source("clinic")
class Clinic(Source):
    "The patients of our clinic."
    @classmethod
    def look(cls, name, root): return (root / "patients.csv").stat().st_size
    def rows(self, chunk_rows=100_000):
        import polars as pl
        yield pl.read_csv(self.root / "patients.csv", infer_schema=False)
    def __init__(self, name, root):
        super().__init__(name, root)
        self.says("patients of our clinic")"""

def test_a_source_of_ones_own(project):
    "One class in the project's notebook, and no edit of mlkit: the pipeline knows it by name, and looks at it."
    notebook = project.json("nbs/task.ipynb")
    cell = {"cell_type": "code", "id": "0c0ffee0", "metadata": {}, "execution_count": None, "outputs": [], "source": OWN.splitlines(keepends=True)}
    (project / "nbs/task.ipynb").write_text(json.dumps(notebook | {"cells": [*notebook["cells"], cell]}))
    people(300).write_csv(project / "patients.csv")
    def add(rows): pl.concat([people(300), rows]).write_csv(project / "patients.csv")
    grows(project, "clinic", add, "prepare")

def test_a_database(project, postgres):
    def insert(rows): ask(postgres, f"INSERT INTO people VALUES {', '.join(map(str, rows.rows()))}")
    ask(postgres, "CREATE TABLE people (age int, height float8, town text, sick text)")
    insert(people(300))
    grows(project, f"{postgres}?table=people", insert)

@pytest.mark.skipif(not FULL, reason="not run: a bucket grows as a topic and an own source do; set MLKIT_TEST_FULL=1")
def test_a_bucket(project, s3):
    def put(rows, key="people/a.csv"): s3.put_object(Bucket="data", Key=key, Body=rows.write_csv())
    put(people(300))
    grows(project, "s3://data/people", lambda rows: put(rows, "people/b.csv"))

def test_a_topic(project):
    "DVC cannot see it: `mlkit repro` looks. What breaks the contract stops every run: what was good before is not taken for what is there now."
    pytest.importorskip("confluent_kafka", reason="not run: no Kafka client (pip install -e '.[kafka]')")
    def repro(rc=0):
        done = project.mlkit("repro", "ingest", rc=rc)
        return ran(done.stdout), "has changed since" in done.stdout, done.stdout + done.stderr
    broker, known = Broker(), shards(project)
    try:
        broker.send("people", *people(300).to_dicts())
        project.param(ingest__source=f"{broker.url}/people")
        project.mlkit("contract", "accept", "data/contract.json")
        assert repro()[:2] == (["ingest"], False)
        first = shards(project)
        assert len(first) == 300 and len(first.join(known, on=first.columns)) == 300 # typed as from files, and drawn for the same splits
        broker.send("people", *people(20, 900).to_dicts(), {"age": 30, "height": 1.7, "town": "Ulm", "sick": "no"})
        assert repro()[:2] == (["ingest"], True) and len(shards(project)) == 321 and shards(project)[:300].equals(first)
        assert repro()[:2] == ([], False)
        broker.send("people", {"age": -70, "height": 1.7, "town": "Ulm", "sick": "no"})
        for _ in range(2): assert "column 'age', row 322: -70 is outside" in repro(rc=1)[2]
    finally: broker.stop()
    steps, _, text = repro()
    assert steps == [] and "could not be looked at, what was brought in before is taken" in text and "Connection refused" in text and len(shards(project)) == 321
