"A column of texts, through every stage: the docstrings of two packages, and a number that says nothing."
import inspect
import json

import numpy as np
import polars as pl
import pytest
import sklearn.ensemble
import sklearn.linear_model
import sklearn.metrics
import sklearn.preprocessing
from conftest import brief
from mlkit.export.chain import OnnxChain
from mlkit.export.signature import arrays
from mlkit.monitoring.statistics import statistics_of
from mlkit.task import load_task
from scipy.stats import ks_2samp
from test_edge import alone_in
from test_new import new, verdict

ODD = ["", " ", "x", "array " * 3000, "\u0130stanbul \u00df \u1e9e \u01c4", "naïve naı\u0308ve", "猫 and 犬", "👩‍💻 don't", "\x00\x1b[31m", "a\u2028b", "<b>array</b>", "NA", "0"]


def docstrings():
    "What stands in two packages: a text of one sentence or of fifty, and whose it is."
    found = {}
    for package, modules in (("numpy", (np, np.linalg, np.random)), ("sklearn", (sklearn.ensemble, sklearn.linear_model, sklearn.metrics, sklearn.preprocessing))):
        for thing in (v for m in modules for _, v in sorted(vars(m).items()) if callable(v)):
            text = " ".join((inspect.getdoc(thing) or "").split())
            if len(text) > 60 and text not in found:
                found[text[:2000]] = package
    return found


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("texts"), docstrings()
    number = np.random.default_rng(0).normal(0, 1, len(found)).round(3)
    pl.DataFrame({"doc": list(found), "number": number, "package": list(found.values())}).write_csv(folder / "docs.csv")
    project, _ = new(folder / "docs", "--from", folder / "docs.csv", "--target", "package")
    brief(project).param(train__n_epochs=6, explain__n_ordinary=2, explain__n_wrong=2)
    project.verdict = verdict(project)
    return project


def test_a_text_goes_through_every_stage(docs):
    contract, figures = docs.json("data/contract.json"), docs.json("reports/metrics/evaluate.json")
    assert [f["dtype"] for f in contract["inputs"]] == ["text", "float64"]
    assert docs.verdict["outcome"].startswith("released") and figures["accuracy"] > 0.9, docs.verdict
    assert docs.verdict["criteria"]["serve.agreement"]["met"] and docs.json("reports/metrics/export.json")["max_difference"] < 1e-4
    page = (docs / "reports/explain.html").read_text()
    assert '<mark class="for5">' in page and '<mark class="against' in page
    assert docs.json("reports/metrics/monitor.json")["fault_is_flagged"]


def test_words_that_the_model_has_not_seen_are_no_drift(docs):
    "It knows the words of its training texts; others of the same kind have more that it does not know, and are calm. Another language is not."
    task = load_task(docs / "data/prepared")
    train, test = (task.input.raw(docs / "data/prepared", split) for split in ("train", "test"))
    usual, calm, other = (statistics_of(task, raw) for raw in (train, test, test.with_columns(doc=pl.lit("Das ist ein Satz in einer anderen Sprache"))))
    for name in ("doc words", "doc rare words"):
        assert ks_2samp(usual[name], calm[name]).pvalue > 0.01 and ks_2samp(usual[name], other[name]).pvalue < 1e-9


def test_texts_of_any_length_are_answered_alike_alone_and_together(docs):
    "Padding, the order and the neighbours of a text change nothing."
    chain = OnnxChain(docs / "models/bundle/onnx")
    texts = [*ODD, *pl.read_csv(docs.root.parent / "docs.csv")["doc"].head(20)]
    rows = [{"doc": text, "number": 0.5} for text in texts]
    def said(some): return chain.answers(arrays(chain.signatures.served, some))["probabilities"]
    together = said(rows)
    alone = np.concatenate([said([row]) for row in rows])
    turned = said(rows[::-1])[::-1]
    assert np.abs(together - alone).max() < 1e-5 and np.abs(together - turned).max() < 1e-5
    assert np.isfinite(together).all()


@pytest.fixture(scope="module")
def device(docs):
    folder = docs.root.parent / "device"
    assert "equal the server's exactly" in docs.mlkit("edge", folder).stdout
    return folder


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused(device, value):
    "On a device; the folder has shown that it refuses what the server does."
    rc, _, err = alone_in(device, given=json.dumps({"doc": value, "number": 0.5}).encode())
    assert rc == 1 and "doc" in err and err.count("\n") == 1, err


def test_a_device_reads_words_as_the_project_does(device, docs):
    chain = OnnxChain(docs / "models/bundle/onnx")
    rows = [{"doc": text, "number": 0.5} for text in ODD if text.strip()]
    rc, out, err = alone_in(device, given=json.dumps(rows).encode())
    expected = chain.answers(arrays(chain.signatures.served, rows))["probabilities"]
    assert (rc, err) == (0, "")
    assert [list(json.loads(line)["probabilities"].values()) for line in out.splitlines()] == expected.tolist()


def test_a_folder_of_texts(tmp_path):
    "One sub-folder a class; a table of texts is made of it, in whatever encoding they are."
    for i in range(12):
        for label, text in (("ham", f"see you at {i}, naïve friend"), ("spam", f"buy {i} cheap pills now")):
            (file := tmp_path / "mails" / label / f"{i}.txt").parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode(("utf-8", "utf-8-sig", "utf-16", "cp1252")[i % 4]))
    (tmp_path / "mails/spam/empty.txt").touch()
    project, done = new(tmp_path / "mail", "--from", tmp_path / "mails")
    assert "25 texts in 2 classes" in done.stdout and "text: text" in done.stdout and "a column is called 'label'" in done.stdout
    project.mlkit("repro", "ingest")
    assert "1 text: is empty (spam/empty.txt)" in (project / "reports/ingest.html").read_text()
    rows = pl.concat(pl.read_parquet(f) for f in sorted((project / "data/shards").glob("*.parquet")))
    assert rows.sort("file")["text"][0] == "see you at 0, naïve friend" and rows["text"].str.contains("naïve friend$").sum() == 12
