"The verdict tells the truth: each planted fault is refused for its own reason, and an honest model is not."
import numpy as np, polars as pl
import pytest
from test_new import new, verdict

def customers(path, n=500):
    "Who leaves depends on two columns and on chance."
    random = np.random.default_rng(4)
    age, calls, town = random.uniform(18, 80, n), random.poisson(3, n), random.choice(["Rome", "Oslo", "Bonn"], n)
    p = 1 / (1 + np.exp(-(0.08 * (age - 50) + 0.7 * (calls - 3))))
    pl.DataFrame({"age": age.round(1), "calls": calls, "town": town, "left": np.where(random.random(n) < p, "yes", "no")}).write_csv(path)

@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    customers(folder / "customers.csv")
    project, _ = new(folder / "shop", "--from", folder / "customers.csv", "--target", "left")
    return project, verdict(project)

def test_an_honest_model_is_released(honest):
    project, v = honest
    assert v["outcome"].startswith("released") and v["criteria"]["evaluate.shortfall"]["value"] == 0
    assert v["criteria"]["evaluate.constant_p_better"]["value"] < 0.01
    figures = project.json("reports/metrics/evaluate.json")
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "pr_auc", "log_loss", "brier", "calibration_error"):
        assert figures[f"{name}_low"] <= figures[name] + 1e-9 and figures[name] <= figures[f"{name}_high"] + 0.05, name
    assert "p = 0.000" not in (project / "reports/evaluate.html").read_text()

def test_a_model_that_learned_nothing_is_refused(honest):
    "Its exit code is 1; the first line names what is missed, the lines after it what would help, and so does the page."
    project, _ = honest
    project.param(train__candidates=["network"], train__n_epochs=1, train__optimizer={"name": "adamw", "lr": 1e-30}) # a step that changes nothing
    done = project.mlkit("repro", rc=1)
    v = project.json("reports/metrics/verdict.json")
    missed = [name for name, c in v["criteria"].items() if not c["met"]]
    assert v["outcome"] == "refused" and "evaluate.shortfall" in missed and "evaluate.constant_p_better" in missed
    assert "evaluate.shortfall: a simple model beside it is clearly better" in done.stdout and "Not released: shop" in done.stdout
    assert "a simple model beside it is clearly better" in (project / "reports/index.html").read_text()
    asked = {"evaluate.shortfall": {"max": 1}, "evaluate.constant_p_better": {"max": 1}}
    project.param(release__protect=asked, release__criteria={"evaluate.accuracy": {"min": 0.1}}) # who wants it all the same writes that down
    assert [line for line in project.mlkit("repro").stdout.splitlines() if line.startswith("Released")]

def test_a_target_that_is_a_sum_of_columns_is_refused(tmp_path):
    "Two counts that add up to the target leak it: the model is perfect, and worth nothing."
    random = np.random.default_rng(5)
    online, shop, size = random.poisson(20, 400), random.poisson(30, 400), random.normal(100, 20, 400)
    pl.DataFrame({"size": size.round(1), "sold online": online, "sold in shop": shop, "sold": online + shop}).write_csv(tmp_path / "sales.csv")
    project, _ = new(tmp_path / "sales", "--from", tmp_path / "sales.csv", "--target", "sold")
    done = project.mlkit("repro", rc=1)
    v = project.json("reports/metrics/verdict.json")
    assert v["outcome"] == "refused" and not v["criteria"]["audit.errors"]["met"]
    assert "sold online" in v["criteria"]["audit.errors"]["evidence"] and "sold online" in done.stdout

def test_a_slip_in_what_is_asked_is_found_first(honest):
    project, _ = honest
    for section, name, meant in (("protect", "evaluate.shortfal", "evaluate.shortfall"), ("warn", "audt.warnings", "audit")):
        before = (project / "params.yaml").read_text()
        project.param(**{f"release__{section}": {name: {"max": 0}}})
        done = project.mlkit("repro", rc=1)
        assert f"release.{section}" in done.stderr and f"did you mean '{meant}'?" in done.stderr and "▸" not in done.stdout
        (project / "params.yaml").write_text(before)
