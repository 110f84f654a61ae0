"Groups of people: a planted gap is found, named and refused; equal groups give no alarm; slips are told before the first stage."
import numpy as np, polars as pl
import pytest
from conftest import one_line, ran
from mlkit.evaluation.fairness import between_groups
from mlkit.registry.verdict import verdict
from mlkit.inputs.rows import Rows
from mlkit.targets.classes import Classes
from mlkit.targets.value import Value, bias_lines
from mlkit.task import Task

CLASSES = {2: Classes("loan", ("no", "yes")), 3: Classes("pet", ("cat", "dog", "eel"))}
VALUE = Value("pay", 50.0, 10.0)

def people(seed, n=600):
    r = np.random.default_rng(seed)
    return pl.DataFrame({"sex": r.choice(["f", "m"], n), "region": r.choice(["n", "e", "s", "w"], n), "age": r.integers(18, 80, n)})

def answers(target, worse, seed):
    "Answers that are wrong in one of ten cases, and in four of ten of the rows `worse`; values err three times as much there."
    r, n = np.random.default_rng(1000 + seed), len(worse)
    if target is VALUE:
        y = r.normal(50, 10, n)
        return (y + r.normal(0, 3, n) * np.where(worse, 3, 1))[:, None], y
    k = target.n_outputs
    y = r.integers(0, k, n)
    wrong = r.random(n) < np.where(worse, 0.4, 0.1)
    return np.eye(k)[np.where(wrong, (y + 1) % k, y)], y

def compared(target, metric, worse, protected, seed):
    p, y = answers(target, worse, seed)
    return between_groups(Task(Rows(()), target), p, y, protected, metric, 0.95, 10, seed)

KINDS = [(CLASSES[2], "accuracy"), (CLASSES[2], "roc_auc"), (CLASSES[3], "balanced_accuracy"), (VALUE, "mae"), (VALUE, "r2")]

@pytest.mark.parametrize("target, metric", KINDS, ids=[f"{t.name} {m}" for t, m in KINDS])
@pytest.mark.parametrize("column, value, named", [("sex", "f", "sex = f"), ("region", "w", "region = w"), ("age", None, "age ≥ ")])
def test_a_planted_gap_is_found_and_named(target, metric, column, value, named):
    rows = people(0)
    worse = (rows[column] == value if value else rows[column] >= rows[column].quantile(0.75)).to_numpy()
    fair = compared(target, metric, worse, rows, 0)
    assert 0 < fair.figures()["fairness_gap_low"] < fair.figures()["fairness_gap"] < fair.figures()["fairness_gap_high"]
    for end in ("", "_low"):
        assert fair.evidence()[f"fairness_gap{end}"].startswith(f"{column}: {metric} ") and named in fair.evidence()[f"fairness_gap{end}"]

@pytest.mark.parametrize("target, metric", KINDS[::2], ids=[f"{t.name} {m}" for t, m in KINDS[::2]])
def test_equal_groups_give_no_alarm(target, metric):
    nobody = np.zeros(600, bool)
    alarms = sum(compared(target, metric, nobody, people(seed).select("sex", "region"), seed).figures()["fairness_gap_low"] > 0 for seed in range(20))
    assert alarms <= 1

def judged(fair, asked):
    name = next(iter(asked))
    metrics = {"evaluate": {"accuracy": 0.9} | fair.figures() | {"evidence": fair.evidence(), "undecided": fair.undecided()}}
    v = verdict({"evaluate.accuracy": {"min": 0.5}}, metrics, "loans", "ab" * 32, "evaluate.accuracy", protect=asked)
    return v["outcome"], v["criteria"][name]

def test_the_verdict_refuses_a_proven_gap():
    rows = people(0)
    unfair = compared(CLASSES[2], "accuracy", (rows["sex"] == "f").to_numpy(), rows, 0)
    alike = compared(CLASSES[2], "accuracy", np.zeros(600, bool), rows, 0)
    asked = {"evaluate.fairness_gap_low": {"max": 0.05}}
    outcome, why = judged(unfair, asked)
    assert outcome == "refused" and "sex = f" in why["evidence"] and "group that fares worse" in why["mend"]
    assert judged(alike, asked)[0] == "released"
    assert judged(alike, {"evaluate.fairness_gap": {"max": 0.001}})[0] == "undecided" # the groups differ, and that may be chance

def test_what_cannot_be_judged_is_not_called_fair():
    rows = people(0).with_columns(town=pl.Series(["a"] * 599 + ["b"]))
    fair = compared(CLASSES[2], "accuracy", np.zeros(600, bool), rows.select("town"), 0)
    outcome, why = judged(fair, {"evaluate.fairness_unjudged": {"max": 0}})
    assert outcome == "undecided" and "town" in why["evidence"]

@pytest.mark.parametrize("protected, words", [(["sex"], ("images", "no columns")), ([], ("fairness_gap_low", "asked for"))])
def test_a_slip_is_told_before_the_first_stage(fresh, tmp_path, protected, words):
    project = fresh.clone(tmp_path / "project")
    project.param(evaluate__protected=protected, release__protect={"evaluate.fairness_gap_low": {"max": 0.05}})
    done = project.mlkit("repro", rc=1)
    one_line(done, "evaluate.protected", *words)
    assert not ran(done.stdout)

def test_the_bias_is_named_by_range():
    r = np.random.default_rng(0)
    said = r.normal(50, 10, 600)
    edge = np.quantile(said, 0.9)
    y = said + r.normal(0, 2, 600)
    honest = bias_lines(VALUE.details(said[:, None], y), 0.95)
    assert honest[1] == "By range of the answer: no bias that could not be chance."
    low = bias_lines(VALUE.details(np.where(said >= edge, said - 12.3, said)[:, None], y), 0.95)
    assert low[0].startswith("The 10 % largest values are answered ") and "too low on average" in low[0]
    high = bias_lines(VALUE.details(np.where(said >= edge, said + 12.3, said)[:, None], y), 0.95)
    assert high[1].startswith("The 10 % largest answers are 12") and "too high on average" in high[1]

@pytest.mark.parametrize("shift", [12.3, -12.3])
def test_the_verdict_refuses_a_proven_bias_of_a_range(shift):
    "Where answers of one range are wrong on average; what chance explains is undecided, and an honest model passes."
    r = np.random.default_rng(0)
    said = r.normal(50, 10, 600)
    y = said + r.normal(0, 2, 600)
    def judged_as(answers, **asked):
        p = answers[:, None]
        evidence, undecided = VALUE.notes(p, y, 0.95)
        figures = VALUE.figures(p, y) | {"evidence": evidence, "undecided": undecided}
        criteria = {"evaluate.r2": {"min": 0.1}}
        v = verdict(criteria, {"evaluate": figures}, "pay", "ab" * 32, "evaluate.r2", protect={f"evaluate.{k}": b for k, b in asked.items()})
        return v["outcome"], v["criteria"][f"evaluate.{next(iter(asked))}"]
    end = said >= np.quantile(said, 0.9) if shift > 0 else said <= np.quantile(said, 0.1)
    biased = np.where(end, said + shift, said)
    outcome, why = judged_as(biased, range_bias_low={"max": 0.2})
    assert outcome == "refused" and f"too {'high' if shift > 0 else 'low'} on average" in why["evidence"] and "reports/evaluate.html" in why["mend"]
    assert judged_as(said, range_bias_low={"max": 0.2})[0] == "released"
    assert judged_as(said, range_bias={"max": 0.001})[0] == "undecided"
