"How a model holds up: planted shortcuts are named, honest models are not accused, and the page of `stress` says both."
from pathlib import Path

import numpy as np, polars as pl
import pytest
from mlkit.data.prepared import save_split
from mlkit.data.split import Split
from mlkit.evaluation.reliance import LIMIT, reliance, reliance_line
from mlkit.evaluation.robustness import MIDDLE, Judge, draw, drop_figures, robustness
from mlkit.flow.config import check, schema
from mlkit.inputs.base import find_input
from mlkit.inputs.image import Image
from mlkit.sources.registry import open_source
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.run import Run, train_records

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, None)}

def trained(task, prepared, shards=None, **train):
    values = check("train", train, schema(ROOT / "nbs/stages/train.ipynb"))
    run = Run(values, task, prepared, shards)
    for _ in train_records(run): pass
    return run.net

def judged(net, task, prepared):
    "The figures of `stress`: reliance by part, the sentence, and how faults hurt."
    test, learned = draw(task, prepared, "test", 1000, 0), draw(task, prepared, "train", 2000, 0)
    judge = Judge(task, test.y, task.target.score_name, 0.95, 0)
    found = reliance(net, task, prepared, test, learned, judge, 0)
    return found, reliance_line(found, judge.metric), robustness(net, task, test, learned.y, judge, 0)

def pictures(folder, X, y):
    "A prepared folder of pictures, and their task."
    for name, part in SPLITS.items(): save_split(folder / f"{name}.safetensors", X[part], y[part], X.shape[1:])
    return Task(Image.fit(X[SPLITS["train"]]), Classes("label", classes=tuple(map(str, np.unique(y)))))

@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits
    data, order = load_digits(), np.random.default_rng(0).permutation(1797)
    return np.round(data.images * 255 / 16).astype(np.uint8)[order, ..., None], data.target[order].astype(np.int64)

def block(X, k): X[:3, :3] = 25 * k # a grey for each class
def lamp(X, k): X[5:, 5:] = 0; X[5 + k // 3 % 3, 5 + k % 3] = 255 * (k < 9) # a pixel for each class
def edge(X, k): X[0] = 0; X[0, k % 8] = 255; X[7, 0] = 255 * (k > 7)

def cnn(task, prepared): return trained(task, prepared, model={"name": "small_cnn", "width": 16}, optimizer={"name": "adamw", "lr": 0.01}, n_epochs=10)

# Shortcuts

@pytest.mark.parametrize("mark, name", [(block, "the top left corner, 3 x 3 pixels"), (lamp, "the bottom right corner, 3 x 3 pixels"), (edge, "the border, 1 pixel wide")])
def test_a_mark_that_follows_the_label_is_named(digits, tmp_path, mark, name):
    X, y = digits[0].copy(), digits[1]
    for x, k in zip(X, y): mark(x, int(k))
    task = pictures(tmp_path, X, y)
    found, line, _ = judged(cnn(task, tmp_path), task, tmp_path)
    assert line.startswith(f"{name}, decides: accuracy falls from ") and "a model that sees nothing else gets 1.00" in line
    assert found[0].reliance > LIMIT and found[0].whole - found[0].exchanged > 0.05

def test_honest_digits_are_not_accused(digits, tmp_path):
    task = pictures(tmp_path, *digits)
    found, line, held = judged(cnn(task, tmp_path), task, tmp_path)
    assert [m.part.name for m in found if m.reliance > LIMIT] == [] and line == ""
    assert len(found) == 6 and max(m.reliance for m in found) < 0.6 * LIMIT, "there is room to the limit"
    assert drop_figures(held)["noise_drop"] < drop_figures(held)["worst_drop"]
    noise = held.table.filter(corruption="noise")["score"]
    assert noise[0] > 0.9 and noise[0] > noise[MIDDLE - 1] > noise[4] > held.constant

def test_what_fills_the_whole_picture_is_no_shortcut(tmp_path):
    "Meadow, sea and desert: each corner tells the class, and so does any other place."
    random, y = np.random.default_rng(0), np.random.default_rng(1).integers(0, 3, 1797)
    colors = np.array([[60, 140, 60], [40, 80, 160], [190, 160, 90]])
    X = (colors[y][:, None, None] + random.normal(0, 25, (1797, 16, 16, 3)) + random.normal(0, 20, (1797, 1, 1, 3))).clip(0, 255).astype(np.uint8)
    task = pictures(tmp_path, X, y)
    net = trained(task, tmp_path, model={"name": "small_cnn", "width": 8}, optimizer={"name": "adamw", "lr": 0.01}, n_epochs=3)
    found, line, _ = judged(net, task, tmp_path)
    assert found[0].whole > 0.95 and line == "" and max(m.reliance for m in found) <= LIMIT
    assert max(m.alone for m in found) > 0.9, "the parts do tell the class"

# Tables

def table(source, target, folder):
    "A table brought in and split by chance, with its task."
    source = open_source(str(source), Path("/"))
    input_type = find_input("rows")
    contract = input_type.ingest(source, folder / "shards", None, target).contract
    split = Split.from_params({"shares": {"train": 0.7, "validation": 0.15, "test": 0.15}, "seed": 0, "method": "random", "golden": None}, folder)
    (folder / "prepared").mkdir()
    fitted, y, *_ = input_type.prepare(folder / "shards", contract, folder / "prepared", split)
    return Task(fitted, y)

def mlp(task, folder): return trained(task, folder / "prepared", folder / "shards", model={"name": "residual_mlp"}, optimizer={"name": "adamw", "lr": 0.005}, n_epochs=15)

def sensors(folder, by_class):
    "900 measurements; collected class by class, or as they came."
    random, n = np.random.default_rng(0), 900
    y = random.integers(0, 2, n)
    if by_class: y = np.sort(y)
    times = np.datetime64("2024-01-01T08:00:00") + np.cumsum(random.exponential(60, n)).astype("timedelta64[s]")
    frame = pl.DataFrame({"written": times.astype(str), "heat": 0.8 * y + random.normal(size=n), "place": random.choice(["north", "south"], n), "state": np.array(["ok", "bad"])[y]})
    frame.write_csv(folder / "sensors.csv")
    return folder / "sensors.csv"

def test_a_time_that_goes_with_the_rows(tmp_path):
    for by_class in (True, False):
        (folder := tmp_path / str(by_class)).mkdir()
        task = table(sensors(folder, by_class), "state", folder)
        found, line, held = judged(mlp(task, folder), task, folder / "prepared")
        assert line.startswith("the column 'written', a time that goes with the rows, decides: accuracy falls from ") == by_class
        assert (max((m.reliance for m in found), default=0) > 0.5) == by_class
        assert set(held.table["corruption"]) == {"jitter", "missing", "typos", "unseen", "wrong_unit"}

@pytest.mark.parametrize("source, target", [("breast_cancer", "diagnosis"), ("diabetes", "progression")])
def test_bundled_tables_have_no_number_of_the_row(source, target, tmp_path):
    task = table(source, target, tmp_path)
    found, line, held = judged(mlp(task, tmp_path), task, tmp_path / "prepared")
    assert (found, line) == ([], "") and set(held.table["corruption"]) == {"jitter", "missing", "wrong_unit"}
    assert held.base[0] > held.constant and held.table["drop"].is_finite().all()

# The stage

def test_the_page_and_the_figures(finished):
    figures, html = finished.json("reports/metrics/stress.json"), (finished / "reports/stress.html").read_text()
    accuracy = finished.json("reports/metrics/evaluate.json")["accuracy"]
    assert figures["score"] == pytest.approx(accuracy, abs=1e-9) and figures["samples"] <= 1000
    assert figures["reliance"] <= LIMIT and figures["evidence"]["reliance"] == ""
    assert figures["worst_drop"] == max(v for k, v in figures.items() if k.endswith("_drop")) > 0
    for text in ("no part was found that should not matter", "hurts most", "learning rate x 3", "another seed", "train.optimizer.lr"): assert text in html, text
    curves = pl.read_csv(finished / "reports/plots/robustness.csv")
    assert curves.height == 5 * curves["corruption"].n_unique() == 35

def test_a_release_asks_for_little_reliance():
    "By default, whatever the criteria are; the evidence names the part."
    from mlkit.registry.verdict import reason_lines, verdict, verdict_line
    protect = schema(ROOT / "nbs/stages/release.ipynb")["protect"][1]
    assert protect["stress.reliance"] == {"max": LIMIT}
    asked = {"stress.reliance": protect["stress.reliance"]}
    for value, outcome in ((LIMIT, "released"), (LIMIT + 0.01, "refused")):
        metrics = {"evaluate": {"accuracy": 0.99}, "stress": {"reliance": value, "evidence": {"reliance": "the top left corner decides"}}}
        judged = verdict({"evaluate.accuracy": {"min": 0.9}}, metrics, "m", "0" * 64, "evaluate.accuracy", protect=asked)
        assert judged["outcome"] == outcome
    assert "stress.reliance 0.06 (asked \u2264 0.05)" in verdict_line(judged) and "the top left corner decides; take that part out" in reason_lines(judged)[0]

def test_a_planted_mark_is_refused(digits, tmp_path):
    "From a folder of pictures to the verdict: a project that `mlkit new` made refuses the model, and says which corner."
    import cv2
    from conftest import brief
    from test_new import new
    for i, (x, k) in enumerate(zip(digits[0][:700].copy(), digits[1])):
        block(x, int(k))
        (folder := tmp_path / "photos" / f"digit {k}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i:04d}.png"), x)
    project, _ = new(tmp_path / "marked", "--from", tmp_path / "photos")
    said = brief(project).mlkit("repro", rc=4).stdout
    figures, verdict = project.json("reports/metrics/stress.json"), project.json("reports/metrics/verdict.json")
    assert figures["evidence"]["reliance"].startswith("the top left corner, 3 x 3 pixels, decides: ") and figures["reliance"] > LIMIT
    assert verdict["outcome"] == "refused" and not verdict["criteria"]["stress.reliance"]["met"]
    assert "stress.reliance" in said and "the top left corner, 3 x 3 pixels, decides" in said
