"`mlkit compare`: what changed, what came of it, and which of two models is better on the same rows."
import pytest
from conftest import EVIL, one_line, quick

@pytest.fixture(scope="module")
def two(finished, tmp_path_factory):
    "The first run is version 1 and a commit; the second, with fewer epochs and another name of the experiment, is the working folder."
    project = finished.clone(tmp_path_factory.mktemp("two") / "project")
    project.git("tag", "first")
    quick(project).param(train__n_epochs=2, train__experiment=EVIL, release__criteria={"evaluate.accuracy": {"min": 0.5}})
    project.mlkit("repro")
    return project

def lines(project, *names): return project.mlkit("compare", *names).stdout.splitlines()

def test_what_changed_stands_before_what_came_of_it(two):
    said = lines(two, "first")
    assert said[0].startswith("A: first (") and said[1] == "B: working folder, Released"
    changed = [i for i, l in enumerate(said) if l.startswith("value train.n_epochs: 30 → 2")]
    came = [i for i, l in enumerate(said) if l.startswith("evaluate.accuracy: ")]
    assert changed and came and changed[0] < came[0]
    assert "(" in said[came[0]] and "−" in said[came[0]], "both intervals and the difference are there"
    assert any(l.startswith("criterion serve.agreement: ✓") and l.endswith("→ –") for l in said), "a criterion that only one asks for"
    assert not any(l.startswith(("code ", "data ", "environment ")) for l in said), "nothing else has changed"

@pytest.mark.parametrize("names", [("1", "."), ("champion", "."), ("first", "2"), ("HEAD", "challenger")])
def test_versions_and_commits_meet_on_the_same_rows(two, names):
    "The second model learned less. Whatever it is called, the paired test sees both."
    said = lines(two, *names)
    paired = next(l for l in said if l.startswith("On the same 288 test samples"))
    assert " is worse than A: accuracy -0.0" in paired and "p " in paired, paired
    assert any(l.startswith("value train.n_epochs: 30 → 2") for l in said)

def test_the_other_way_round_the_sign_turns(two):
    assert " is better than A: accuracy +0." in "\n".join(lines(two, ".", "first"))

def test_the_same_is_the_same(two):
    said = lines(two, ".", ".")
    assert "another answer for 0 of them" in said[-2] and not any(" → " in l for l in said)

def test_values_that_no_run_has_used(two, tmp_path):
    "The figures are of the last run, and so are the values; the note says that params.yaml went on."
    other = two.clone(tmp_path / "other")
    other.param(train__n_epochs=77)
    said = lines(other, "first")
    assert any(l.startswith("value train.n_epochs: 30 → 2") for l in said) and not any("→ 77" in l for l in said)
    assert any("params.yaml has other values by now (train.n_epochs)" in l for l in said)

def test_the_page(two):
    two.mlkit("compare", "first")
    page = (two / "reports/compare.html").read_text()
    assert EVIL not in page and "&lt;img src=x" in page
    assert page.count("<figure>") >= 4 and "train.<wbr>n_<wbr>epochs" in page and "Released" in page
    assert "figures are the same" in page

def test_other_test_rows_are_no_pair(two, tmp_path):
    other = two.clone(tmp_path / "other")
    other.param(prepare__seed=1)
    other.mlkit("repro", "evaluate")
    said = lines(other, "first")
    assert "No paired test: the test rows differ." in said
    assert any(l.startswith("data data/prepared: ") for l in said)

@pytest.mark.parametrize("names, says", [
    (("no-such",), "'no-such' is no version, no revision of git and no experiment"), (("9",), "the registry has no '9'"),
    (("--", "-x"), "'-x' is no version"), (("first", "HEAD~99"), "'HEAD~99' is no version"), (("shadow",), "shadow"),
    (("first", "9", "--model", "nobody"), "nobody")])
def test_what_there_is_not(two, names, says):
    one_line(two.mlkit("compare", *names, rc=1), says)

def test_a_revision_without_metrics(project):
    project.git("rm", "-q", "-r", "--cached", "reports/metrics")
    project.git("commit", "-qm", "no metrics")
    project.git("tag", "empty")
    one_line(project.mlkit("compare", "empty", rc=1), "empty (", "holds no metrics; after a run, commit reports/metrics and dvc.lock")

@pytest.mark.parametrize("broken", ["{", "[1]", ""])
def test_damaged_metrics(two, tmp_path, broken):
    other = two.clone(tmp_path / "other")
    (other / "reports/metrics/evaluate.json").write_text(broken)
    if broken: one_line(other.mlkit("compare", "first", rc=1), "reports/metrics/evaluate.json: is damaged")
    else: assert any("evaluate.accuracy" in l and "→ –" in l for l in lines(other, "first"))
