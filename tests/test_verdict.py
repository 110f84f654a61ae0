"The verdict tells the truth: each planted fault is refused for its own reason, and an honest model is not."
import numpy as np, polars as pl
import pytest
from conftest import brief
from test_new import Made, new, releases_of_a_shop
from test_report import text

@pytest.fixture(scope="module")
def shop(shared): return shared("shop", releases_of_a_shop, Made)

def test_an_honest_model_is_released(shop):
    v, figures = (shop.said["honest.metrics"][name] for name in ("verdict", "evaluate"))
    assert v["outcome"].startswith("released") and v["criteria"]["evaluate.shortfall"]["value"] == 0
    assert v["criteria"]["evaluate.constant_p_better"]["value"] < 0.01
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "pr_auc", "log_loss", "brier", "calibration_error"):
        assert figures[f"{name}_low"] <= figures[name] + 1e-9 and figures[name] <= figures[f"{name}_high"] + 0.05, name
    assert "p = 0.000" not in (shop / "reports/evaluate.html").read_text()

def test_a_model_that_learned_nothing_is_refused(shop):
    "Its exit code is 4; the first line names what is missed, the lines after it what would help, and so does the page."
    v, said = shop.said["nothing.metrics"]["verdict"], shop.said["nothing"]
    missed = [name for name, c in v["criteria"].items() if not c["met"]]
    assert v["outcome"] == "refused" and "evaluate.shortfall" in missed and "evaluate.constant_p_better" in missed
    assert "evaluate.shortfall: a simple model beside it is clearly better" in said and "Not released: shop" in said
    assert "a simple model beside it is clearly better" in shop.said["nothing.index"]
    assert [line for line in shop.said["lenient"].splitlines() if line.startswith("Released")] # who wants it all the same writes that down

def test_it_is_said_who_had_more_rows(shop):
    "A table's model is fitted again to both splits, the others are not. Where nothing beats it, the verdict and the card say so."
    said = "was fitted again to the training and the validation rows (train.refit), the others to the training rows alone"
    assert said in text((shop / "reports/evaluate.html").read_text())
    for run, told in (("honest", True), ("nothing", False)): # a model that is beaten although it had more rows needs no excuse
        verdict = shop.said[f"{run}.metrics"]["verdict"]["criteria"]["evaluate.shortfall"]
        assert (said in verdict["evidence"]) == told == verdict["met"], run

def test_few_rows_are_cross_validated(shop):
    contest = shop.json("models/candidates/contest.json")
    assert {"network", "linear", "trees"} <= set(contest["candidates"])
    assert "few samples:" in (shop / "reports/train.html").read_text()

def test_a_target_that_is_a_sum_of_columns_is_refused(tmp_path):
    "Two counts that add up to the target leak it: the model is perfect, and worth nothing."
    random = np.random.default_rng(5)
    online, shop, size = random.poisson(20, 400), random.poisson(30, 400), random.normal(100, 20, 400)
    pl.DataFrame({"size": size.round(1), "sold online": online, "sold in shop": shop, "sold": online + shop}).write_csv(tmp_path / "sales.csv")
    project, _ = new(tmp_path / "sales", "--from", tmp_path / "sales.csv", "--target", "sold")
    brief(project).param(train__candidates=["linear"]) # of two columns, a line is the answer
    done = project.mlkit("repro", rc=4)
    v = project.json("reports/metrics/verdict.json")
    assert v["outcome"] == "refused" and not v["criteria"]["audit.errors"]["met"]
    assert "sold online" in v["criteria"]["audit.errors"]["evidence"] and "sold online" in done.stdout

def test_a_slip_in_what_is_asked_is_found_first(shop):
    for section, name, meant in (("protect", "evaluate.shortfal", "evaluate.shortfall"), ("warn", "audt.warnings", "audit")):
        before = (shop / "params.yaml").read_text()
        shop.param(**{f"release__{section}": {name: {"max": 0}}})
        done = shop.mlkit("repro", rc=1)
        assert f"release.{section}" in done.stderr and f"did you mean '{meant}'?" in done.stderr and "▸" not in done.stdout
        (shop / "params.yaml").write_text(before)
