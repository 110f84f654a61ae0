"A challenger meets the champion on the same test rows; the test set counts who asked; changed criteria are shown; the page of the registry."
import json
import re
import shutil

import polars as pl
import pytest
from mlkit.core import RegistryError, read_json
from mlkit.registry.history import HISTORY, read_history, releases
from mlkit.registry.looks import read_looks
from mlkit.registry.store import champion_bundle, compared_on_rows
from mlkit.registry.verdict import VERDICT
from mlkit.training.store import mlflow_client
from test_new import Made, releases_of_a_shop

@pytest.fixture(scope="module")
def shop(shared):
    project = shared("shop", releases_of_a_shop, Made)
    return project, project.said["lenient"], project.said["honest"]

def client_of(project):
    uri = f"sqlite:///{project.root}/mlflow.db"
    return mlflow_client(uri), uri

def test_the_first_one_meets_nobody(shop):
    project, first, _ = shop
    assert "version 1, champion and challenger" in first and "test rows: " not in first
    assert "Test set: asked about this model only" in first
    assert "Criteria: changed after the test set was first asked" in first and "evaluate.shortfall: was ≤ 0, is ≤ 1" in first

def test_an_honest_better_one_is_promoted(shop):
    "In the lines, in the history, in MLflow, and in the JSON for programs."
    project, _, second = shop
    line, = [line for line in second.splitlines() if line.startswith("Registry: better on the same ")]
    assert "test rows: accuracy 0." in line and "ahead by" in line and "version 2, champion and challenger" in second
    entries = read_history(project.root)
    against = releases(entries, "shop")[-1]["against"]
    assert against["outcome"] == "better" and against["promoted"] and against["low"] > 0 and against["p_better"] < 0.05
    assert against["champion"] == releases(entries, "shop")[0]["to"]["bundle"] and f"Registry: {against['text']}" == line
    assert entries[-1]["what"] == "champion" and entries[-1]["why"] == against["text"]
    client, _ = client_of(project)
    assert client.get_model_version("shop", "2").tags["against_champion"] == against["text"]
    assert project.json("reports/verdict.json")["against_champion"] == against

def test_models_and_criteria_are_counted(shop):
    "Two models asked the same rows; what was asked of them is not the same, and that refuses nothing."
    project, _, second = shop
    looks = read_looks(project.root)
    assert len(looks) == 2 and len({e["test"] for e in looks}) == 1 and len({e["bundle"] for e in looks}) == 2
    assert "Test set: asked about 2 models since" in second and "the best of 2 looks better than it is by up to about 0.0" in second
    assert "Criteria: changed after the test set was first asked" in second and re.search("evaluate.accuracy: was ≥ 0.5.*?, is ≥ 0.6", second)
    test_set = project.json("reports/verdict.json")["test_set"]
    assert test_set["models"] == 2 and any("is ≥ 0.6" in line for line in test_set["changed"]) and 0 < test_set["optimism"] < 0.05
    project.mlkit("repro")
    assert read_looks(project.root) == looks

def test_two_branches_merge_their_looks(shop):
    project, *_ = shop
    assert "looks.jsonl merge=union" in (project / ".gitattributes").read_text()
    project.commit()
    main = project.git("branch", "--show-current").stdout.strip()
    look, = [json.dumps(e) for e in read_looks(project.root)[:1]]
    for branch in "ab":
        project.git("checkout", "-q", main)
        project.git("checkout", "-q", "-b", branch)
        with open(project / "looks.jsonl", "a") as f:
            f.write(look.replace('"bundle": "', f'"bundle": "{branch}') + "\n")
        project.git("commit", "-qam", branch)
    project.git("merge", "-q", "--no-edit", "a")
    assert len(read_looks(project.root)) == 4
    project.git("checkout", "-q", main)

def test_the_pages(shop):
    project, *_ = shop
    page, index = ((project / f"reports/{name}.html").read_text() for name in ("registry", "index"))
    assert "The history is intact: 6 entries" in page and "Against the champion then: better on the same" in page
    assert '<a href="registry.html">' in index and "<dt>challenger</dt><dd>version 2" in index and "<dt>test set</dt>" in index
    assert "asked about 2 models" in page and "<dt>data</dt><dd>not noted" not in page

@pytest.fixture
def bundles(shop, tmp_path, monkeypatch):
    "The project, and copies of the bundles of the first champion and of the challenger."
    project, *_ = shop
    monkeypatch.chdir(project.root)
    client, uri = client_of(project)
    first = {"model": "shop", "to": releases(read_history(project.root), "shop")[0]["to"]}
    shutil.copytree(champion_bundle(project.root, client, uri, first), tmp_path / "champion")
    shutil.copytree(project / "models/bundle", tmp_path / "challenger")
    return project, tmp_path / "champion", tmp_path / "challenger", read_json(project / VERDICT)

def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

def test_swapped_they_are_judged_the_other_way(bundles):
    project, champion, challenger, verdict = bundles
    assert compared_on_rows(project.root, champion, challenger, verdict).outcome == "better"
    assert compared_on_rows(project.root, challenger, champion, verdict).outcome == "worse"
    same = compared_on_rows(project.root, challenger, challenger, verdict)
    assert same.outcome == "undecided" and "see no difference" in same.text

def test_who_tries_often_meets_luck(bundles):
    "Each further model on the same rows has to lead more clearly; a lead that was enough for the second is not for the forty-first."
    from mlkit.registry.champion import ask_both, judge, score_named
    project, champion, challenger, verdict = bundles
    first = read_looks(project.root)[0]
    text = (project / "looks.jsonl").read_text()
    more = [json.dumps(first | {"bundle": f"{i:064x}"}) for i in range(39)]
    (project / "looks.jsonl").write_text(text + "\n".join(more) + "\n")
    try:
        found = compared_on_rows(project.root, champion, challenger, verdict)
    finally:
        (project / "looks.jsonl").write_text(text)
    assert (found.tried, found.outcome) == (40, "better") and "40 models were tried on these rows, so p < 0.001" in found.text
    assert compared_on_rows(project.root, champion, challenger, verdict).tried == 1
    rows = ask_both(project / "data/prepared", champion, challenger)
    wrong = (rows.mine.argmax(1) != rows.y).nonzero()[0][:4]
    lucky = rows.mine.copy()
    lucky[wrong] = lucky[wrong, ::-1] # four more than the champion has right
    rows, score = type(rows)(rows.task, rows.y, lucky, rows.mine), score_named(rows.task, "evaluate.accuracy", True)
    assert judge(rows, "accuracy", score, 0.95, tried=1).promoted
    found = judge(rows, "accuracy", score, 0.95, tried=40)
    assert found.outcome == "undecided" and not found.promoted and found.wanted > len(rows.y)

@pytest.mark.parametrize("what, says", [
    ("column", "it reads 'years', which the model of today does not have"), ("type", "'age' was int64 and is float64"),
    ("class", "the classes are others: 'maybe', 'yes'"), ("target", "it predicts another target (classification of bought"),
    ("gone", "task.json"), ("damaged", "ONNX Runtime cannot load it"), ("no signature", "not a signature file"),
])
def test_a_champion_of_another_time(bundles, what, says):
    "Said in words, with what to do; the challenger does not become champion by it."
    project, champion, challenger, verdict = bundles
    signatures = champion / "onnx/signatures.json"
    if what == "column":
        change(signatures, '"age"', '"years"')
    elif what == "type":
        told = json.loads(signatures.read_text())
        told["steps"]["preprocess"]["inputs"][0]["dtype"] = "int64"
        signatures.write_text(json.dumps(told))
    elif what == "class":
        change(signatures, '"yes"', '"maybe"')
    elif what == "target":
        change(champion / "task.json", '"left"', '"bought"')
    elif what == "gone":
        shutil.rmtree(champion)
    elif what == "damaged":
        (champion / "onnx/fused.onnx").write_bytes(b"no ONNX")
    else:
        signatures.write_text("{}")
    found = compared_on_rows(project.root, champion, challenger, verdict)
    assert found.outcome == "cannot be compared" and not found.promoted
    assert says in found.text and "a person decides: 'mlkit promote" in found.text, found.text

def test_a_lost_champion(bundles):
    project, *_ = bundles
    client, uri = client_of(project)
    lost = {"model": "shop", "to": {"version": "9", "bundle": "0" * 64}}
    with pytest.raises(RegistryError, match="is not in this registry; MLFLOW_TRACKING_URI may name another one"):
        champion_bundle(project.root, client, uri, lost)

def test_a_slice_that_got_worse(bundles):
    "The challenger is better in all, and answers at random in one town: it stays challenger, and the town is named."
    import numpy as np
    from mlkit.registry.champion import ask_both, judge, score_named
    project, champion, challenger, verdict = bundles
    rows = ask_both(project / "data/prepared", champion, challenger)
    town = pl.read_parquet(project / "data/prepared/test.parquet")["town"]
    right = np.eye(2)[rows.y]
    rome = (town == "Rome").to_numpy()[:, None]
    got_worse = type(rows)(rows.task, rows.y, np.where(rome, 1 - right, right), rows.theirs, rows.slices)
    found = judge(got_worse, "accuracy", score_named(rows.task, "evaluate.accuracy", True), 0.95)
    assert found.lead > 0 and found.outcome == "worse in a part" and not found.promoted
    assert "worse in town = Rome: error 1, the champion 0." in found.text
    assert [s["slice"] for s in found.slices][0] == "town = Rome"

def test_a_broken_history_is_said_on_the_page(shop):
    project, *_ = shop
    path = project / HISTORY
    text = path.read_text()
    path.write_text(text.replace('"version": "1"', '"version": "7"', 1))
    try:
        project.mlkit("release", rc=1)
        page = (project / "reports/registry.html").read_text()
        assert "The history is broken." in page and "line 2 does not follow" in page and "Against the champion" not in page
    finally:
        path.write_text(text)
    project.mlkit("release")
    assert "The history is intact" in (project / "reports/registry.html").read_text()
