"`mlkit predict`: the notebook's answers for a whole source; killed at any moment it goes on; what is wrong is one line, and no file."
import os
import shutil
import sqlite3
import time

import cv2
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import one_line
from filelock import FileLock
from mlkit.cli import main
from mlkit.core import write_json
from mlkit.data.shards import read_images, read_index
from mlkit.serving import batch
from test_new import Made, releases_of_a_shop

@pytest.fixture(scope="module")
def shop(shared): return shared("shop", releases_of_a_shop, Made)

class Done:
    "What a command in this process left."
    def __init__(self, result):
        if not isinstance(result.exception, (SystemExit, type(None))): raise result.exception
        self.returncode, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr

@pytest.fixture
def ask(shop, tmp_path, monkeypatch):
    "`ask(source, …)`: the command in this process, the working folder in the project, files in a folder of the test."
    (folder := shop / "new").mkdir()
    monkeypatch.chdir(folder)
    yield lambda *args: Done(CliRunner().invoke(main, ["predict", *map(str, args)]))
    shutil.rmtree(folder)
    shutil.rmtree(shop / ".mlkit/predict", ignore_errors=True)

def customers(shop): return shop.root.parent / "customers.csv"

def files(): return sorted(os.listdir())

def table(name, *rows, head="age,calls,town"):
    with open(name, "w") as f: f.write("\n".join([head, *rows]) + "\n")
    return name

def test_the_answers_of_the_notebook(shop, ask):
    "All rows that the model was made from: those of the test set have the answers of the page of `evaluate`, by its own code."
    done = ask(customers(shop))
    assert done.returncode == 0 and "1,500 rows answered in" in done.stdout and "refused" not in done.stdout and files() == ["customers.predictions.parquet"]
    answers = pl.read_parquet("customers.predictions.parquet")
    assert answers.columns == ["row", "age", "calls", "town", "left", "answer", "probability_no", "probability_yes"]
    assert answers["row"].to_list() == list(range(1, 1501))
    given = pl.read_csv(customers(shop), infer_schema=False)
    assert answers.select(given.columns).equals(given)
    page = pl.read_parquet(shop / "data/predictions.parquet").select(pl.col("key").cast(pl.Int64).alias("row"), "predicted", "confidence")
    both = answers.join(page, on="row", maintain_order="left")
    said = np.where(both["answer"] == "yes", both["probability_yes"], both["probability_no"])
    assert len(both) == len(page) > 100 and both["answer"].equals(both["predicted"], check_names=False)
    assert np.abs(said - both["confidence"].to_numpy()).max() < 1e-5

def test_one_table_in_many_forms(shop, ask):
    "A CSV, a Parquet file, JSON lines, a folder of two files, an SQLite table, an address, and an alias: the same answers."
    frame = pl.read_csv(customers(shop)).head(200)
    frame.write_csv("a.csv")
    frame.write_parquet("b.parquet")
    frame.write_ndjson("c.jsonl")
    os.mkdir("d")
    frame[:90].write_csv("d/1.csv")
    frame[90:].write_csv("d/2.csv")
    with sqlite3.connect("e.db") as db:
        db.execute("CREATE TABLE people (age REAL, calls INTEGER, town TEXT, \"left\" TEXT)")
        db.executemany("INSERT INTO people VALUES (?, ?, ?, ?)", frame.rows())
    given = []
    for i, source in enumerate(["a.csv", "b.parquet", "c.jsonl", "d", "e.db?table=people", f"file://{os.getcwd()}/a.csv", "a.csv"]):
        done = ask(source, "--out", f"{i}.csv", "--columns", "", *(["--alias", "champion"] if i == 6 else []))
        assert done.returncode == 0, (source, done.stdout, done.stderr)
        given.append(pl.read_csv(f"{i}.csv"))
    assert given[0].columns == ["row", "answer", "probability_no", "probability_yes"]
    for i, other in enumerate(given[:6]): assert other.equals(given[0]), i
    assert len(given[6]) == 200

def test_bad_rows_are_apart(shop, ask):
    "Each kind of value that is refused stands with row, column and reason; its neighbours have the answers that they have alone."
    rows = ["30,2,Rome", "old,3,Bonn", " 41 , 1 , Oslo ", "inf,x,Rome", ",,", "50,2,Paris", "5000,2,Rome"]
    done = ask(table("new.csv", *rows))
    assert done.returncode == 0 and "5 rows answered" in done.stdout and "warning: 2 rows refused, 28.57% of all: new.predictions.refused.csv" in done.stdout
    assert pl.read_csv("new.predictions.refused.csv").select("row", "column", "value").rows() == [(2, "age", "old"), (4, "age", "inf"), (4, "calls", "x")]
    assert "column 'town': 1 value not among the contract's categories, taken as unknown (row 6: 'Paris')" in done.stdout
    assert "column 'age': 1 value outside the contract's range (row 7: '5000')" in done.stdout
    answers = pl.read_parquet("new.predictions.parquet")
    assert answers["row"].to_list() == [1, 3, 5, 6, 7] and answers["age"].to_list() == ["30", " 41 ", "", "50", "5000"]
    table("alone.csv", rows[2])
    assert ask("alone.csv").returncode == 0
    columns = ["answer", "probability_no", "probability_yes"]
    assert pl.read_parquet("alone.predictions.parquet").select(columns).equals(answers[1].select(columns))
    # where people own the contract, it refuses what is out of range, and a category that it does not have, as the server does
    shop.param(ingest__contract="data/contract.json")
    try: done = ask("new.csv", "--force")
    finally: shop.param(ingest__contract=None)
    refused = pl.read_csv("new.predictions.refused.csv")
    said = refused.select("row", "column", "reason").rows()
    assert {(7, "age", "is outside the contract's range"), (6, "town", "is not among the contract's categories")} <= set(said), said
    # and once all is mended, no file tells of what was refused
    assert ask(table("new.csv", rows[0]), "--force").returncode == 0 and "new.predictions.refused.csv" not in files()

def test_what_is_wrong_is_one_line(shop, ask, monkeypatch):
    table("new.csv", "30,2,Rome", "old,3,Bonn")
    table("other.csv", "1,2", head="a,b")
    table("head.csv")
    table("ragged.csv", "30,2,Rome", "1,2")
    table("all.csv", "x,2,Rome", "y,2,Rome")
    open("empty.csv", "w").close()
    os.mkdir("nothing")
    before = {f: open(f).read() for f in files() if f != "nothing"}
    wrong = {
        ("nee.csv",): ["nee.csv: no such file or folder; did you mean 'new.csv'?"],
        ("other.csv",): ["column 'age' is missing", "is this another table?"],
        ("empty.csv",): ["empty.csv: is empty"], ("head.csv",): ["a header but no rows"], ("nothing",): ["is empty"],
        ("ragged.csv",): ["ragged.csv, line 3: 2 fields where the header has 3"],
        ("all.csv",): ["none of 2 rows can be answered: row 1, column 'age': 'x' is not a number; nothing was written"],
        ("new.csv", "--strict"): ["row 2, column 'age': 'old' is not a number", "nothing was written"],
        ("new.csv", "--out", "x.xlsx"): ["written as .parquet or .csv"], ("new.csv", "--out", "none/x.csv"): ["none/x.csv: cannot be written"],
        ("new.csv", "--out", "other.csv"): ["other.csv: is there already; --force replaces it"],
        ("new.csv", "--columns", "agee"): ["column 'agee' is missing; did you mean 'age'?"],
        ("new.csv", "--alias", "nobody"): ["nobody"], ("digits",): ["holds images, the model takes a table"]}
    for args, words in wrong.items():
        one_line(ask(*args), *words)
        assert {f: open(f).read() for f in files() if f != "nothing"} == before, args
    assert not list((shop / ".mlkit/predict").glob("*.lock"))
    def full(*args): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(batch, "write_atomic", full)
        one_line(ask("new.csv"), "no space left on the disk")
    assert files() == sorted([*before, "nothing"])
    job = batch.Job(None, "", shop.root, (shop / "new/x.csv").resolve(), None)
    with FileLock(job.folder.with_suffix(".lock")):
        one_line(ask("new.csv", "--out", "x.csv"), "another 'mlkit predict' writes it now")
    verdict = shop.json("reports/metrics/verdict.json")
    write_json(shop / "reports/metrics/verdict.json", verdict | {"released": False})
    one_line(ask("new.csv"), "not released")
    write_json(shop / "reports/metrics/verdict.json", verdict | {"bundle": "ab" * 32})
    one_line(ask("new.csv"), "not the bundle of the verdict")
    write_json(shop / "reports/metrics/verdict.json", verdict)

def test_killed_at_any_moment(shop, ask, monkeypatch):
    "`kill -9` before the first part, in the middle, and at the end: each run goes on, and the files are those of a run in one piece."
    random, n = np.random.default_rng(0), 220_000
    age = random.uniform(18, 80, n).round(1).astype("<U6")
    age[::5000] = "old"
    pl.DataFrame({"age": age, "calls": random.poisson(3, n), "town": random.choice(["Rome", "Oslo", "Bonn"], n)}).write_csv("big.csv")
    monkeypatch.chdir("/") # else this process is one of the project's, which `started` ends
    new = shop / "new"
    whole = shop.run("mlkit", "predict", "new/big.csv", "--out", "new/whole.parquet").stdout
    assert "219,956 rows answered" in whole and "44 rows refused" in whole
    folder = batch.Job(None, "", shop.root, (shop / "new/cut.parquet").resolve(), None).folder
    resumed = []
    for parts in (0, 1, 3, 5):
        with shop.started("mlkit", "predict", "new/big.csv", "--out", "new/cut.parquet") as p:
            while p.is_running() and p.status() != "zombie" and not ((folder / "work.json").exists() and len(list(folder.glob("0*.json"))) >= parts): time.sleep(0.002)
            p.kill()
            p.wait()
        resumed.append(p.out.read_text())
        assert not (new / "cut.parquet").exists() or parts == 5
    assert "goes on behind row 50,000" in resumed[2] + resumed[1], resumed
    last = shop.run("mlkit", "predict", "new/big.csv", "--out", "new/cut.parquet", rc=None)
    assert last.returncode == 0 or "is there already" in last.stderr # the last kill came too late
    for ending in (".parquet", ".refused.csv"):
        assert (new / f"cut{ending}").read_bytes() == (new / f"whole{ending}").read_bytes()
    assert not [*new.glob(".*.tmp")] and not list((shop / ".mlkit/predict").iterdir())

def test_images_of_any_folder(finished, tmp_path, monkeypatch):
    "Unlabelled images in any sub-folders get the answers of the chain; what is no such image is refused by name."
    index = read_index(finished / "data/shards").head(300)
    X = np.stack(list(read_images(finished / "data/shards", index)))
    for i, x in enumerate(X):
        (path := tmp_path / "photos" / f"day {i % 3}" / f"{i:04d}.png").parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), x)
    photos = tmp_path / "photos"
    (photos / "torn.png").write_bytes((photos / "day 0/0000.png").read_bytes()[:60])
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (photos / "gone.jpg").symlink_to("nowhere")
    cv2.imwrite(str(photos / "large.png"), np.zeros((20, 20), np.uint8))
    (photos / "notes.txt").write_text("hello")
    monkeypatch.chdir(finished.root)
    done = Done(CliRunner().invoke(main, ["predict", str(photos), "--out", str(tmp_path)]))
    assert done.returncode == 0 and "300 rows answered" in done.stdout, done.stdout + done.stderr
    answers = pl.read_parquet(tmp_path / "photos.predictions.parquet")
    names = sorted((f"day {i % 3}/{i:04d}.png", i) for i in range(300))
    assert answers["image"].to_list() == [n for n, _ in names] and answers["row"].to_list()[:2] == [1, 2]
    model = batch.Model(finished / "models/bundle")
    expected = model.chain.answers((X[[i for _, i in names]],))
    assert answers["answer"].to_list() == expected["answer"].ravel().tolist()
    assert np.abs(answers.select(f"probability_{c}" for c in "0123456789").to_numpy() - expected["probabilities"]).max() < 1e-6
    refused = dict(pl.read_csv(tmp_path / "photos.predictions.refused.csv").select("value", "reason").rows())
    assert {k: v.split(",")[0] for k, v in refused.items()} == {
        "gone.jpg": "is a link that leads nowhere", "large.png": "has height 20 where the contract has 8",
        "phone.heic": "is HEIC", "torn.png": "is a PNG file that is damaged or cut short"}
