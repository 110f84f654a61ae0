"The best model there is: candidates beside each other, and whichever wins goes through all that follows."
import numpy as np, polars as pl
import pytest
from conftest import FULL, brief
from test_new import new, verdict

def houses(path, n=1200):
    "A price that is a line in some columns, steps in others, and chance: no single kind of model is the best for all of it."
    random = np.random.default_rng(3)
    size, garden, distance, age = random.normal(100, 30, n), random.exponential(200, n), random.uniform(0, 20, n), random.uniform(0, 100, n)
    town = np.array(list("abcdefghijkl"))[random.integers(0, 12, n)]
    steps = 45 * np.isin(town, list("bdgk")) * (age < 50) + 30 * (age > 80)
    price = 1.5 * size + 0.12 * garden - 3 * distance + steps + random.normal(0, 25, n)
    frame = pl.DataFrame({"size": size.round(1), "garden": garden.round(1), "distance": distance.round(2), "age": age.round(1), "town": town})
    gaps = pl.Series(random.random(n) < 0.03)
    frame.with_columns(garden=pl.when(gaps).then(None).otherwise(pl.col("garden")), price=pl.Series(price.round(2))).write_csv(path)

@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    houses(folder / "houses.csv")
    project, _ = new(folder / "houses", "--from", folder / "houses.csv", "--target", "price")
    brief(project)
    return project, verdict(project)

def test_whoever_wins_is_exported_served_and_released(blended):
    project, v = blended
    contest = project.json("models/candidates/contest.json")
    assert v["outcome"].startswith("released"), v
    assert contest["chosen"] == "blend" and {"network", "linear", "trees"} < set(contest["candidates"]), contest
    assert v["criteria"]["serve.agreement"]["met"] and project.json("reports/metrics/export.json")["max_difference"] < 1e-4
    figures = project.json("reports/metrics/evaluate.json")
    assert all(figures["r2"] >= figures[f"{name}_r2"] - 0.002 for name in ("network", "linear", "trees"))
    page = (project / "reports/train.html").read_text()
    assert "chosen: blend, since it has the best r2 on held-out samples" in page and "trees" in page
    kept = project.json("reports/metrics/train.json")["kept_epoch"]
    assert f"kept: epoch {kept} of 8, the best by r2, and where it hardly differs the loss, on the validation split" in page

@pytest.mark.skipif(not FULL, reason="not run: a second fit of each candidate; set MLKIT_TEST_FULL=1")
def test_it_is_the_same_bytes_the_next_time(blended):
    project, _ = blended
    names = "models/model.safetensors", *(f"models/candidates/{n}.safetensors" for n in ("network", "linear", "trees"))
    before = project.outputs("train")
    assert set(names) <= before.keys()
    project.mlkit("repro", "-f", "train")
    after = project.outputs("train")
    assert [n for n in before if before[n] != after[n] and "measurements" not in n] == []

def test_each_alone_too(blended):
    "Trees have a file for FIL and no TensorRT engine; what was left out stands beside as a baseline."
    project, _ = blended
    before = (project / "params.yaml").read_text()
    project.param(train__candidates=[{"name": "trees", "max_depth": 4}], export__engine="auto")
    done = project.mlkit("repro", rc=None)
    v, figures = project.json("reports/metrics/verdict.json"), project.json("reports/metrics/evaluate.json")
    assert v["criteria"]["serve.agreement"]["met"], done.stdout
    assert "linear_r2" in figures and "TensorRT does not run" in done.stdout
    assert (project / "models/bundle/onnx/fil/houses/1/xgboost.ubj").is_file()
    assert [line for line in done.stdout.splitlines() if line.startswith(("Released", "Not released", "Undecided"))]
    (project / "params.yaml").write_text(before)

@pytest.mark.parametrize("asked, says", [
    (["tres"], "did you mean 'trees'"), ([{"name": "trees", "max_dept": 3}], "did you mean 'max_depth'"),
    ([{"name": "trees", "max_depth": 0}], "max_depth"), ([{"depth": 3}], "train.candidates"),
    ("balanced", "train.class_weight is for classes, these data have regression")])
def test_a_slip_is_found_before_the_first_stage(blended, asked, says):
    project, _ = blended
    before = (project / "params.yaml").read_text()
    project.param(**{"train__candidates": asked} if isinstance(asked, list) else {"train__class_weight": asked})
    done = project.mlkit("repro", rc=1)
    (project / "params.yaml").write_text(before)
    assert says in done.stderr and "▸" not in done.stdout and "Traceback" not in done.stderr
