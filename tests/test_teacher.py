"A small network that learns from a teacher: who may teach, what they are asked, and what the pages say of it."
import shutil
from dataclasses import replace

import numpy as np, torch
import pytest
from conftest import ran
from test_pipeline import stale
from mlkit.candidates.base import Data, outputs_of
from mlkit.candidates.network import network
from mlkit.candidates.teacher import Candidate, check_contract
from mlkit.core import ConfigError, DataError
from mlkit.inputs.columns import Number
from mlkit.inputs.rows import Rows
from mlkit.targets.classes import Classes
from mlkit.targets.value import Value
from mlkit.task import Task
from mlkit.training.run import completed
from mlkit.training.spread import Group
from mlkit.training.teacher import packed

ROWS = Rows((Number("x", "float64"),))
TRAIN = {"model": {"name": "residual_mlp", "width": 8, "n_blocks": 1, "dropout": 0.0}, "optimizer": {"name": "adamw", "lr": 0.02}, "schedule": {"name": "one_cycle"},
         "augment": None, "loss": {}, "n_epochs": 15, "batch_size": 32, "keep": "last", "seed": 0}

def line(target, y_of, n=400, **more):
    "One column, and what is true of it."
    random = np.random.default_rng(0)
    X = {s: random.normal(size=(n, 1)).astype(np.float32) for s in ("train", "validation")}
    return X, Data(Task(ROWS, target), lambda task, split: X[split], {s: y_of(x[:, 0], random) for s, x in X.items()}, **more)

def test_each_row_meets_its_own_answer():
    "The teacher has another rule than the truth has. A student that hears only the teacher learns that rule, also where rows are parted anew."
    X, data = line(Classes("y", ("no", "yes")), lambda x, _: (x > 0).astype(np.int64))
    data.taught = {s: np.log(np.where((x > 1) == [[False, True]], 0.99, 0.01)).astype(np.float32) for s, x in X.items()}
    values = completed(TRAIN | {"teacher": {"name": "bundle", "folder": "large", "weight": 1.0, "temperature": 1.0}})
    turned = data.part(np.random.default_rng(1).permutation(800)[:400], np.arange(400))
    for rows in (data, turned):
        found = network(rows, values)
        said = outputs_of(found.net, found.task, X["validation"]).argmax(1).numpy()
        assert (said == (X["validation"][:, 0] > 1)).mean() > 0.95
    alone = network(data, values | {"teacher": None})
    assert (outputs_of(alone.net, alone.task, X["validation"]).argmax(1).numpy() == (X["validation"][:, 0] > 0)).mean() > 0.95
    data.taught = None
    with pytest.raises(ConfigError, match="no answers stand beside these samples"): network(data, values)

def test_a_value_is_taught_too():
    X, data = line(Value("y", 10.0, 2.0), lambda x, _: (10 + 2 * x).astype(np.float32))
    data.taught = {s: -x for s, x in X.items()} # in standard deviations; the truth rises
    found = network(data, completed(TRAIN | {"teacher": {"name": "bundle", "folder": "large", "weight": 1.0}}))
    assert np.corrcoef(outputs_of(found.net, found.task, X["validation"])[:, 0], X["validation"][:, 0])[0, 1] < -0.95

def test_a_row_is_answered_by_trees_that_have_not_seen_it():
    "Labels are chance, so only who has seen a row can know it. And no label of the validation split reaches the answers for the training split."
    _, data = line(Classes("y", ("no", "yes")), lambda x, random: random.integers(0, 2, len(x)))
    teacher = Candidate(of={"name": "trees", "learning_rate": 0.5, "min_child_weight": 0.0}, folds=3)
    found, answers = teacher.fitted(data, {})
    def right(said): return (said.argmax(1) == data.y["train"]).mean()
    assert right(answers["train"]) < 0.6 < right(outputs_of(found.net, found.task, data.X("train", found.task)).numpy())
    data.y["validation"] = 1 - data.y["validation"]
    assert np.array_equal(teacher.fitted(data, {})[1]["train"], answers["train"])

def test_who_cannot_learn_the_target_cannot_teach_it():
    class Many(Value): n_outputs = 2
    _, data = line(Many("y"), lambda x, _: x)
    with pytest.raises(ConfigError, match="'trees' cannot learn a target of regression"): Candidate(of="trees").fitted(data, {})

def test_weights_of_classes_are_counted_beside_answers_too(monkeypatch):
    "Each of two processes knows the weight of the truth in its part of a batch, whether a teacher's answers stand beside it or not."
    group, y = Group(0, 2, torch.device("cpu")), torch.tensor([0, 1, 1])
    monkeypatch.setattr(group, "sum", lambda w: w + 7, raising=False) # the other part weighs 7
    beside = packed(y, torch.zeros(3, 2))
    assert group.scale(beside, 6, (1.0, 5.0)) == group.scale(y, 6, (1.0, 5.0)) == 2 * 11 / 18

def test_the_contract_alone_tells_who_cannot_teach(finished):
    from mlkit.data.contract import load_contract
    from mlkit.training.model import load_model
    contract, digits = load_contract(finished / "data/contract.json"), load_model(finished / "models/model.safetensors")[2]
    check_contract("m", digits, contract)
    for other, says in ((replace(digits, target=replace(digits.target, classes=("a", "b"))), "only one of the two knows '0', '1', '2' …"),
                        (replace(digits, target=Value("label")), "it learned regression of 'label'"), (Task(ROWS, digits.target), "it reads rows, and these data are image")):
        with pytest.raises(DataError, match=says): check_contract("m", other, contract)

def test_a_small_network_learns_from_the_model_of_before(project):
    "What a user does: the bundle of the large network is copied, and teaches a small one. DVC sees it; the pages show what it is worth."
    shutil.copytree(project / "models/bundle", project / "teachers/large")
    project.param(train__model={"name": "small_cnn", "width": 4}, train__n_epochs=2, train__teacher={"name": "bundle", "folder": "teachers/large"})
    done = project.mlkit("repro", "evaluate")
    assert ran(done.stdout) == ["tune", "train", "evaluate"]
    assert "made from the same data version" in done.stdout and "chosen: network, since it is the only candidate" in done.stdout
    figures, page, told = project.json("reports/metrics/train.json"), (project / "reports/train.html").read_text(), (project / "reports/evaluate.html").read_text()
    assert {"accuracy_gain", "log_loss_gain_p_better"} <= figures.keys() and "student_alone" in page and "with the teacher" in page
    assert "worst slice" in told and "student_alone" in told
    sizes = {n: (project / f"models/candidates/taught/{n}.safetensors").stat().st_size for n in ("teacher", "student", "student_alone")}
    assert sizes["teacher"] > 10 * sizes["student"] and sizes["student"] == sizes["student_alone"]
    (project / "teachers/large/bundle.json").write_text((project / "teachers/large/bundle.json").read_text() + "\n")
    why = stale(project)
    assert why["train"] == why["tune"] == ["teachers/large"] and "teachers/large" in why["stress"]
