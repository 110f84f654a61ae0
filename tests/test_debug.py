"`mlkit debug`: one sample's way, and that it names what differs between notebook, ONNX and server."
import json
import cv2, numpy as np, onnx, polars as pl
import pytest
from conftest import EVIL, brief, few, one_line
from onnx import numpy_helper
from test_new import new
from mlkit.triton_server.server import Triton
from mlkit.export.fuse import write_fused

STEPS = ["As it stands", "What the contract says", "What the model sees", "Scores and answer", "Why this answer",
         "The nearest training samples", "The same elsewhere"]

def steps(text): return [l.split(". ", 1)[1] for l in text.splitlines() if l[:1].isdigit() and ". " in l]
def row(text, start): return next(l for l in text.splitlines() if l.strip().startswith(start))

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("debug")
    random, n = np.random.default_rng(4), 300
    age, town = random.uniform(18, 80, n), random.choice(["Rome", "Oslo", "Bonn"], n)
    day = [f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in range(n)]
    leaves = random.random(n) < 1 / (1 + np.exp(-0.2 * (age - 50)))
    pl.DataFrame({"age": age.round(1), "town": town, "since": day, "left": np.where(leaves, "yes", "no")}).write_csv(folder / "a.csv")
    project, _ = new(folder / "shop", "--from", folder / "a.csv", "--target", "left")
    brief(project)
    project.mlkit("repro", "export")
    return project

def test_the_whole_way_of_an_image(finished):
    said = finished.mlkit("debug", "12").stdout
    assert steps(said) == STEPS
    assert "label: 4" in said and "The answer is 4, its label is 4." in said
    assert row(said, "ONNX").split()[1:] == ["4", row(said, "notebook").split()[2], "the", "same"]
    assert row(said, "server")

def test_one_image_by_three_names(finished, tmp_path):
    "Its place in the test split, its row, and its file: the same answer."
    at, key = 12, pl.read_parquet(finished / "data/prepared/test.parquet")["_row"][12]
    name = pl.read_parquet(finished / "data/prepared/test.parquet")["name"][12]
    from mlkit.data.prepared import load_split
    X, _ = load_split(finished / "data/prepared/test.safetensors")
    assert cv2.imwrite(str(tmp_path / "four.png"), X[at])
    answers = {row(finished.mlkit("debug", s).stdout, "notebook") for s in (str(at), f"_row={key}", name, str(tmp_path / "four.png"))}
    assert len(answers) == 1

def test_a_live_server_is_asked(finished):
    with Triton(finished / "serving/model_repository") as server:
        said = finished.mlkit("debug", "3", "--server", server.url).stdout
    assert "the same" in row(said, "server") and row(said, "server").split()[1] == row(said, "notebook").split()[1]
    gone = finished.mlkit("debug", "3", "--server", server.url).stdout
    assert "none" in row(gone, "server") and "http://" in gone

def scaled(path, by):
    "An ONNX file whose constants are others."
    model = onnx.load(str(path))
    for t in model.graph.initializer:
        x = numpy_helper.to_array(t)
        if x.dtype in (np.float32, np.float64):
            t.CopyFrom(numpy_helper.from_array((x * by).astype(x.dtype), t.name))
    path.unlink()
    onnx.save(model, str(path))

@pytest.mark.parametrize("step, by, early", few([("preprocess", 1.5, True), ("model", 0.5, False)]))
def test_an_export_that_differs_is_named(project, step, by, early):
    scaled(project / f"models/export/{step}.onnx", by)
    write_fused(project / "models/export")
    said = project.mlkit("debug", "3").stdout
    assert "ONNX differs from the notebook." in said and "differs by" in said
    assert ("Already before the model: value" in said) == early

def test_the_whole_way_of_a_row(shop):
    said = shop.mlkit("debug", "3").stdout
    assert steps(said) == STEPS and "left: " in said and "since week" in said
    assert "the same" in row(said, "ONNX")
    parts = said.split("Why this answer")[1].split("The nearest")[0]
    assert "since" in parts and next(l for l in parts.splitlines() if l.split()[:1] and l.split()[0] in ("age", "town", "since")).split()[0] == "age"

def test_a_row_as_a_person_writes_it(shop):
    "Read as ingest reads it: the text '41' is the number 41."
    text, number = ('{"age": " 41 ", "town": " Rome", "since": "2024-05-01"}', '{"age": 41, "town": "Rome", "since": "2024-05-01"}')
    a, b = (shop.mlkit("debug", t).stdout for t in (text, number))
    assert row(a, "notebook") == row(b, "notebook") and row(a, "ONNX") == row(b, "ONNX") and "the same" in row(a, "ONNX")

@pytest.mark.parametrize("given, refused", [
    ({"age": "many", "town": "Rome", "since": "2024-05-01"}, "age"), ({"town": "Rome", "since": "2024-05-01"}, "age"),
    ({"age": 3, "town": "Rome", "since": "yesterday"}, "since"), ({"age": [1], "town": "Rome", "since": "2024-05-01"}, "age")])
def test_what_the_server_refuses_ends_with_the_contract(shop, given, refused):
    said = shop.mlkit("debug", json.dumps(given)).stdout
    assert steps(said) == STEPS[:2] and f"The server refuses this row: {refused}." in said

def test_a_value_that_the_contract_does_not_have(shop):
    said = shop.mlkit("debug", '{"age": 41, "town": "Paris", "since": "2024-05-01", "hat": 1}').stdout
    assert "none of the 3 values in the contract" in said and "no column of the contract" in said

@pytest.mark.parametrize("sample, says", [
    ("998", "there is no number 998"), ("_row=999999", "no sample '_row=999999'"), ("nowhere.png", "no sample 'nowhere.png'"),
    ('{"age": 41', "the sample is no JSON"), ("[1]", "write an object of column and value"), ("", "no sample ''"), ("params.yaml", "the model reads rows")])
def test_what_there_is_not(shop, sample, says):
    one_line(shop.mlkit("debug", sample, rc=1), says)

@pytest.mark.parametrize("sample, says", [('{"image": 1}', "the model reads images"), ("params.yaml", "params.yaml: ")])
def test_what_is_no_image(finished, sample, says):
    one_line(finished.mlkit("debug", sample, rc=1), says)

def test_before_a_run(fresh):
    one_line(fresh.mlkit("debug", "1", rc=1), "run 'mlkit repro' first")

def test_the_page_holds_text_as_text(shop):
    shop.mlkit("debug", json.dumps({"age": 41, "town": EVIL, "since": "2024-05-01"}), "--html")
    page = (shop / "reports/debug.html").read_text()
    assert EVIL not in page and "&lt;img src=x" in page and all(s in page for s in STEPS)
