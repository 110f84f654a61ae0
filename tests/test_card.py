"The model card, the ML Test Score, and a stage of one's own whose figures the release judges."
import pytest
from conftest import EVIL, few, one_line, ran, sha256
from mlkit.flow.report import figure

def test_the_card_goes_with_the_bundle(finished):
    listed = finished.json("models/bundle/bundle.json")
    card = (finished / "models/bundle/card.md").read_text()
    assert listed["builds"]["card.md"]["sha256"] == sha256(finished / "models/bundle/card.md") and "card.md" not in listed["files"]
    verdict = finished.json("reports/metrics/verdict.json")
    assert f"- **Bundle**: {verdict['bundle'][:12]}" in card and card.startswith("# Model card: digits\n")
    assert [l[3:] for l in card.splitlines() if l.startswith("## ")] == [
        "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data", "Quantitative analyses",
        "Ethical considerations", "Caveats and recommendations"]

def test_what_it_says_is_what_was_measured(finished):
    card, evaluate = (finished / "models/bundle/card.md").read_text(), finished.json("reports/metrics/evaluate.json")
    line = next(l for l in card.splitlines() if l.startswith("| evaluate.accuracy | 0"))
    value, low, high = (figure(evaluate[f"accuracy{end}"]) for end in ("", "_low", "_high"))
    assert line == f"| evaluate.accuracy | {value} | {low} to {high} |"
    prepare = finished.json("reports/metrics/prepare.json")
    assert f"- **Training samples**: {prepare['train']:,}" in card and f"- **Test samples**: {prepare['test']:,}" in card
    assert "not stated (`release.card.intended_use` in params.yaml)" in card

def test_what_people_state_is_text(project):
    project.param(release__card={"intended_use": f"Reading digits {EVIL}", "owner": "the | team"})
    project.mlkit("repro", "release")
    card, page = (project / "models/bundle/card.md").read_text(), (project / "reports/release.html").read_text()
    assert "- **Intended use**: Reading digits &#60;img" in card and "- **Owner**: the \\| team" in card
    assert "<img src=x" not in page and "../models/bundle/card.md" in page and "Model card: digits" in page

def test_a_slip_in_what_is_stated(project):
    project.param(release__card={"intended_uses": "x"})
    done = project.mlkit("repro", rc=1)
    one_line(done, "release.card", "intended_use")
    assert not ran(done.stdout)

def test_the_score_is_the_lowest_sum(finished):
    score = finished.json("reports/ml_test_score.json")
    assert len(score["items"]) == 28 and len({i["item"] for i in score["items"]}) == 28
    sums = {s: sum(i["points"] for i in score["items"] if i["section"] == s) for s in score["sections"]}
    assert sums == score["sections"] and score["ml_test_score"] == min(sums.values())
    assert finished.json("reports/metrics/verdict.json")["ml_test_score"] == score["ml_test_score"]
    page = (finished / "reports/release.html").read_text()
    assert all(i["item"].replace("'", "&#x27;") in page or i["item"] in page for i in score["items"])

def test_it_is_earned_by_doing(project):
    "A contract of one's own and bounds on the figures earn points; bounds that are taken away cost them."
    def points(): return {i["item"]: i["points"] for i in project.json("reports/ml_test_score.json")["items"]}
    before = points()
    project.mlkit("contract", "accept")
    project.param(release__warn={"audit.warnings": {"max": 0}})
    project.mlkit("repro", "release")
    after = points()
    assert (before["Feature expectations are captured in a schema."], after["Feature expectations are captured in a schema."]) == (0.5, 1)
    assert (before["Model quality is sufficient on important data slices."], after["Model quality is sufficient on important data slices."]) == (1, 0.5)

PROBE = '''from mlkit.core import write_json
from mlkit.flow.stage import Stage

stage = Stage("probe", reads={"model": "models/model.safetensors"}, metrics={"metrics": "reports/metrics/probe.json"})
write_json(stage.output("metrics"), {"reliance": reliance, "undecided": {}, "evidence": {"reliance": "the mark in the corner"}})'''

def add_stage(project, reliance):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    from nbformat import write
    cells = [new_markdown_cell("# Probe\n> My own."), new_code_cell(f"reliance: int = {reliance}", metadata={"tags": ["parameters"]}), new_code_cell(PROBE)]
    write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}),
          str(project / "nbs/stages/probe.ipynb"))

@pytest.mark.parametrize("reliance, code", few([(2, 4), (0, 0)]))
def test_a_stage_of_ones_own_enters_the_verdict_by_being_there(project, reliance, code):
    "Nothing in release.ipynb names it. The release waits for it, and judges what it has measured."
    add_stage(project, reliance)
    project.param(release__protect={"probe.reliance": {"max": 0}})
    done = project.mlkit("repro", rc=None)
    order, verdict = ran(done.stdout), project.json("reports/metrics/verdict.json")
    assert done.returncode == code, done.stdout[-1500:] + done.stderr[-1500:]
    assert order.index("probe") < order.index("release") < order.index("monitor")
    assert verdict["criteria"]["probe.reliance"]["value"] == reliance and verdict["released"] == (code == 0)
    assert verdict["criteria"]["probe.reliance"]["evidence"] == "the mark in the corner"
    assert "probe.reliance" in (project / "models/bundle/card.md").read_text()
    read = project.stages["release"]["deps"]
    assert "reports/metrics/probe.json" in read and "reports/metrics/monitor.json" not in read

def test_a_figure_that_no_stage_measures(project):
    project.param(release__protect={"probe.reliance": {"max": 0}})
    one_line(project.mlkit("repro", rc=1), "no stage 'probe' gives metrics to the release")
