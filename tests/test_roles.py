"`mlkit new --group --time --split`: wages by person, of which a random split leaks the person."
import numpy as np, polars as pl
import pytest
from click.testing import CliRunner
from test_new import Made

from mlkit.cli import main

@pytest.fixture(scope="module")
def wages(tmp_path_factory):
    "Eight years of 150 persons, who keep their schooling and about their wage."
    random, n, path = np.random.default_rng(0), 150, tmp_path_factory.mktemp("data") / "wages.csv"
    school, start, worth = random.integers(8, 17, n), random.integers(0, 15, n), random.normal(0, 0.35, n)
    who, year = np.repeat(np.arange(n), 8), np.tile(np.arange(8), n)
    wage = 0.06 * school[who] + 0.02 * (start[who] + year) + worth[who] + random.normal(0, 0.3, 8 * n)
    pl.DataFrame({"person": [f"P{i:03d}" for i in who], "school": school[who], "experience": start[who] + year,
                  "asked": [f"{1980 + y}-06-{1 + i % 28:02d}" for i, y in zip(who, year)], "wage": wage.round(4)}).write_csv(path)
    return path

def made(wages, tmp_path, *args):
    done = Made(tmp_path).run("mlkit", "new", tmp_path / "p", "--from", wages, "--target", "wage", *args)
    return Made(tmp_path / "p"), done

def test_a_random_split_leaks_and_a_split_by_person_does_not(wages, tmp_path):
    project, _ = made(wages, tmp_path)
    project.mlkit("repro", "audit")
    found = project.json("reports/metrics/audit.json")
    text, = (f["text"] for f in found["findings"] if f["check"] == "group_leak" and "'person'" in f["text"])
    assert "R² " in text and "by a random split" in text and found["warnings"] >= 1 and found["errors"] == 0
    (tmp_path / "by").mkdir()
    project, done = made(wages, tmp_path / "by", "--group", "person", "--time", "asked")
    assert "prepare.method" in done.stdout and "'person' says which rows belong together" in done.stdout
    project.mlkit("repro", "prepare")
    assert (project.json("contract.json")["group"], project.json("contract.json")["time"]) == ("person", "asked")
    splits = [set(pl.read_parquet(project / f"data/prepared/{s}.parquet")["person"]) for s in ("train", "validation", "test")]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert not [f for f in project.json("reports/metrics/audit.json")["findings"] if f["check"] == "group_leak"]

def test_a_split_by_time(wages, tmp_path):
    project, _ = made(wages, tmp_path, "--split", "time")
    project.mlkit("repro", "prepare")
    train, test = (pl.read_parquet(project / f"data/prepared/{s}.parquet")["asked"] for s in ("train", "test"))
    assert train.max() <= test.min()

@pytest.mark.parametrize("args, said", [
    (("--group", "persn"), "--group: no column is called 'persn'; did you mean 'person'?"),
    (("--time", "askd"), "--time: no column is called 'askd'; did you mean 'asked'?"),
    (("--time", "school"), "--time: 'school' holds no dates; dates are in asked"),
    (("--group", "wage"), "--group: 'wage' is the target"),
    (("--protected", "persn"), "--protected: no column is called 'persn'; did you mean 'person'?"),
    (("--protected", "school", "--protected", "wage"), "--protected: 'wage' is the target"),
    (("--split", "grup"), "--split: 'grup' is none of random, stratified, group, time; did you mean 'group'?"),
    (("--split", "group"), "--split group: needs --group COLUMN"),
    (("--split", "stratified"), "'wage' is a number")])
def test_what_cannot_be(wages, tmp_path, args, said):
    done = CliRunner().invoke(main, ["new", str(tmp_path / "p"), "--from", str(wages), "--target", "wage", *args])
    assert said in done.stderr and isinstance(done.exception, SystemExit) and done.exit_code == 1 and not (tmp_path / "p").exists()
