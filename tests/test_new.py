"`mlkit new`: a folder of photos and a messy table become projects that reach a verdict; the table untouched."
import sqlite3

import cv2, numpy as np, polars as pl
import pytest
from conftest import FULL, ROOT, Project, brief, one_line, ran

class Made(Project):
    "A project outside the checkout: its mlkit is the installed one."
    @property
    def env(self): return super().env | {"PYTHONPATH": str(ROOT)}

def new(folder, *args, rc=0):
    done = Made(folder.parent).run("mlkit", "new", folder, *args, rc=rc)
    assert rc or not status(Made(folder)), "a first commit is made, and it holds all"
    return Made(folder), done

def customers(path, n=500):
    "Who leaves depends on two columns and on chance."
    random = np.random.default_rng(4)
    age, calls, town = random.uniform(18, 80, n), random.poisson(3, n), random.choice(["Rome", "Oslo", "Bonn"], n)
    p = 1 / (1 + np.exp(-(0.08 * (age - 50) + 0.7 * (calls - 3))))
    pl.DataFrame({"age": age.round(1), "calls": calls, "town": town, "left": np.where(random.random(n) < p, "yes", "no")}).write_csv(path)

STILL = {"name": "adamw", "lr": 1e-30} # steps that change nothing: half and half for everybody
LENIENT = {"audit.errors": {"max": 99}, "evaluate.shortfall": {"max": 1}, "evaluate.constant_p_better": {"max": 1}}

def releases_of_a_shop(folder):
    "A model that learned nothing, refused; the same where the criteria let all through; an honest one under tighter criteria."
    customers(folder / "customers.csv", 1500)
    project, _ = new(folder / "shop", "--from", folder / "customers.csv", "--target", "left")
    honest = (brief(project) / "params.yaml").read_text()
    steps = {
        "nothing": {"train__candidates": ["network"], "train__n_epochs": 1, "train__optimizer": STILL},
        "lenient": {"release__compare": "evaluate.accuracy", "release__criteria": {"evaluate.accuracy": {"min": 0.1}}, "release__protect": LENIENT},
        "honest": {"release__compare": "evaluate.accuracy", "release__criteria": {"evaluate.accuracy": {"min": 0.6}}}}
    for step, values in steps.items():
        if step == "honest":
            (project / "params.yaml").write_text(honest)
        project.param(**values)
        project.said[step] = project.mlkit("repro", rc=4 if step == "nothing" else 0).stdout
        kept = {name: project.json(f"reports/metrics/{name}.json") for name in ("verdict", "evaluate")}
        project.said[f"{step}.index"] = (project / "reports/index.html").read_text()
        project.said[f"{step}.metrics"] = kept
    return project

def briefly(project):
    "`brief`, committed with the dvc.yaml that follows from it."
    brief(project).mlkit("render")
    project.commit()

def verdict(project):
    done = project.mlkit("repro", rc=None)
    assert "Traceback" not in done.stdout + done.stderr and "Report: " in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert (project / "reports/index.html").is_file() and "up to date" in project.mlkit("repro", rc=None).stdout
    return project.json("reports/metrics/verdict.json")

def status(project):
    "What git would tell of the project: 'A  dvc.lock', '?? champion.json', ..."
    return project.git("status", "--porcelain", ".").stdout.splitlines()

def drive(project, tmp_path):
    "git and DVC drive a made project that has run: nothing of the cache is committed, experiments run, a clean clone gets everything."
    metrics = [f"reports/metrics/{name}" for name in sorted(p.name for p in (project / "reports/metrics").iterdir())]
    assert status(project) == ["?? champion.json", "?? dvc.lock", "?? history.jsonl", "?? looks.jsonl", "?? reports/"] and len(metrics) == 12
    project.git("add", "-A")
    assert status(project) == [f"A  {p}" for p in ("champion.json", "dvc.lock", "history.jsonl", "looks.jsonl", *metrics)]
    project.git("commit", "-qm", "a run")
    tried = project.dvc("exp", "run", "-S", "train.optimizer.lr=0.003", "-S", "train.n_epochs=1", "evaluate")
    assert ran(tried.stdout) == ["tune", "train", "evaluate"] # what tune would search has changed
    assert {line[3:] for line in status(project)} == {"dvc.lock", "params.yaml", "reports/metrics/evaluate.json", "reports/metrics/train.json"}
    assert "reports/metrics/evaluate.json" in project.dvc("metrics", "diff").stdout
    project.git("checkout", "-q", ".")
    project.dvc("checkout", "-q")
    project.dvc("remote", "add", "-q", "-d", "store", tmp_path / "store")
    project.dvc("push", "-q")
    project.git("commit", "-qam", "a store")
    project.git("clone", "-q", ".", tmp_path / "elsewhere/clone") # where the raw data are not
    clone = Made(tmp_path / "elsewhere/clone")
    clone.dvc("pull", "-q")
    assert clone.outputs() == project.outputs() and not status(clone)
    again = clone.mlkit("repro")
    assert "up to date" in again.stdout and not status(clone) and clone.json("champion.json") == project.json("champion.json")

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Sizes, depths and folders of all kinds; a torn file, a copy, and files that are no images."
    random, folder = np.random.default_rng(3), tmp_path_factory.mktemp("data") / "photos"
    def photo(label, grey):
        h, w = random.integers(40, 120, 2)
        x = np.clip(random.normal(random.integers(60, 180), 20, (h, w, 3)), 0, 255).astype(np.uint8)
        color, at, s = tuple(int(v) for v in random.integers(0, 255, 3)), (int(w * random.uniform(.3, .7)), int(h * random.uniform(.3, .7))), int(min(h, w) * random.uniform(.2, .35))
        if label == "Circles": cv2.circle(x, at, s, color, -1)
        elif label == "cross es": cv2.line(x, (at[0] - s, at[1] - s), (at[0] + s, at[1] + s), color, s // 3 + 1); cv2.line(x, (at[0] + s, at[1] - s), (at[0] - s, at[1] + s), color, s // 3 + 1)
        else: x[:, ::6] = color
        return cv2.imencode(".jpg", cv2.cvtColor(x, cv2.COLOR_BGR2GRAY) if grey else x)[1].tobytes()
    for label, n in (("Circles", 50), ("cross es", 40), ("stripes", 9)):
        for i in range(n):
            (f := folder / label / ("second batch" if i % 2 else "") / f"IMG_{i:04d}.{'JPG' if i % 5 else 'jpeg'}").parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(photo(label, i % 11 == 0))
    (folder / "stripes/torn.jpg").write_bytes(f.read_bytes()[:200]); (folder / "Circles/copy.jpg").write_bytes((folder / "Circles/IMG_0002.JPG").read_bytes())
    for label, n in (("only one", 1), ("a pair", 2)): # and a copy of one of the pair
        (folder / label).mkdir()
        for i in range(n): (folder / label / f"{i}.jpg").write_bytes(x := photo("Circles", False))
    (folder / "a pair/copy.jpg").write_bytes(x)
    (folder / "notes.txt").write_text("hello"); (folder / "Circles/Thumbs.db").write_bytes(b"x")
    return folder

def test_photos(photos, tmp_path):
    project, done = new(tmp_path / "shapes", "--from", photos)
    assert "105 images in 5 classes; left out, with fewer than three different ones: 'a pair' (2), 'only one' (1)" in " ".join(done.stdout.split()) and "1 unreadable" in done.stdout
    briefly(project)
    v = verdict(project)
    assert v["model"] == "shapes" and v["released"]
    drive(project, tmp_path)
    assert project.json("reports/metrics/audit.json")["unreadable"] == 1
    assert project.json("data/prepared/task.json")["target"]["classes"] == ["Circles", "cross es", "stripes"] and project.json("reports/metrics/prepare.json")["left_out"] == 5
    assert "Left out, with fewer than three different images, one a split: 'a pair' (2), 'only one' (1)" in "".join(o.get("text", "") if isinstance(o.get("text"), str) else "".join(o.get("text", [])) for c in project.json("reports/prepare.ipynb")["cells"] for o in c.get("outputs", []))
    # one's own network and metric, by name
    project.param(train__model={"name": "contrast_cnn", "width": 8}, train__n_epochs=1)
    assert set(ran(project.mlkit("repro", "evaluate").stdout)) == {"tune", "train", "evaluate"}
    assert 0 < project.json("reports/metrics/evaluate.json")["top2_accuracy"] <= 1
    # a photo more: no other sample changes its split
    splits = lambda: {c: s for s in ("train", "validation", "test") for c in pl.read_parquet(project / f"data/prepared/{s}.parquet")["content"]}
    before = splits()
    (photos / "Circles/IMG_9000.jpg").write_bytes(cv2.imencode(".jpg", np.random.default_rng(9).integers(0, 255, (50, 60, 3), dtype=np.uint8))[1].tobytes())
    project.mlkit("repro", "prepare")
    after = splits()
    assert len(after) == len(before) + 1 and before.items() <= after.items()

def discs(folder, n=160):
    "Photos, and a table that says how much of each a disc covers, in percent."
    random, lines = np.random.default_rng(6), ["photo;area"]
    (folder / "photos").mkdir(parents=True)
    for i, radius in enumerate(random.integers(2, 9, n)):
        x = np.clip(random.normal(60, 10, (20, 20, 3)), 0, 255).astype(np.uint8)
        cv2.circle(x, (10, 10), int(radius), tuple(random.integers(150, 256, 3).tolist()), -1)
        cv2.imwrite(str(folder / f"photos/{i:03d}.png"), x)
        lines.append(f"photos/{i:03d}.png;{100 * np.pi * radius ** 2 / 400:.2f}")
    (folder / "areas.csv").write_text("\n".join(lines) + "\n")
    return folder / "areas.csv"

def test_photos_with_values(tmp_path):
    "Numbers with decimals beside images are values: they are learned, judged and exported as such."
    project, done = new(tmp_path / "areas", "--from", f"{discs(tmp_path / 'discs')}?file=photo")
    assert "160 images with a value each" in done.stdout and "  evaluate.metric     r2 " in done.stdout
    project.param(export__engine="none", export__variants=["fp32"], train__n_epochs=12)
    project.mlkit("repro", "export")
    assert project.json("data/contract.json")["task"] == "regression" and project.json("data/prepared/task.json")["target"]["std"] > 1
    scores = project.json("reports/metrics/evaluate.json")
    assert scores["r2"] > 0.5 and "top2_accuracy" not in scores and project.json("reports/metrics/export.json")["max_difference"] < 1e-3

def messy(path):
    "As somebody's export looks: semicolons, a byte order mark, missing values in three spellings, decimal commas, an empty column, a date, an id, notes with quotes, a copied row."
    random, lines = np.random.default_rng(5), ["Customer ID;Signed up;Age;City;Fax;Income (EUR);Plan;Complaints;Active;Notes;Left"]
    for i in range(500):
        age, complaints, plan = int(random.integers(18, 90)), int(random.poisson(1)), str(random.choice(["basic", "plus", "Pro"]))
        left = random.random() < 1 / (1 + np.exp(-(-1.5 + 1.2 * complaints - 1.0 * (plan == "Pro") + 0.02 * (45 - age))))
        row = [f"C{100000 + i}", f"{random.integers(2018, 2026)}-{random.integers(1, 13):02d}-{random.integers(1, 29):02d}", "" if i % 17 == 0 else "unknown" if i == 300 else age,
               random.choice(["Köln", "São Paulo", "", "N/A", *(f"Town {k}" for k in range(30))]), "", "" if i % 9 == 0 else f"{random.lognormal(10, 0.6):,.2f}".translate(str.maketrans(",.", ".,")), plan, complaints,
               random.choice(["TRUE", "FALSE"]), '"said ""maybe""; call back"' if i % 10 == 0 else "", "" if i % 97 == 0 else ("yes" if left else "no")]
        lines += [";".join(map(str, row))] * (2 if i == 40 else 1)
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    return path

def test_messy_table(tmp_path):
    project, done = new(tmp_path / "churn", "--from", messy(tmp_path / "customers.csv"), "--target", "Left")
    assert "Customer ID: aside" in done.stdout or "Customer ID: id" in done.stdout
    assert "Income (EUR): float64; numbers with a decimal comma" in done.stdout and "Fax: aside; no value at all" in done.stdout
    briefly(project)
    v = verdict(project)
    assert v["model"] == "churn" and v["released"] and v["compare"] == "evaluate.accuracy"
    assert project.json("reports/metrics/serve.json")["agreement"] == 1 and project.json("reports/metrics/monitor.json")["calm_is_calm"]
    # broken data are stopped by the contract that one owns, in one line
    project.mlkit("contract", "accept")
    text = (tmp_path / "customers.csv").read_text(encoding="utf-8-sig").splitlines()
    (tmp_path / "customers.csv").write_text("\n".join([text[0].replace("Age;", ""), *text[1:]]) + "\n")
    one_line(project.mlkit("repro", rc=1), "ingest")

def test_a_value(tmp_path):
    "Regression, on a bundled table."
    project, _ = new(tmp_path / "dia", "--from", "diabetes")
    briefly(project)
    v = verdict(project)
    drive(project, tmp_path) if FULL else project.commit()
    apart = project.dvc("exp", "run", "--temp", "-S", "train.n_epochs=1", "evaluate") # in another folder, by DVC's own copy of git's settings
    assert ran(apart.stdout) == ["tune", "train", "evaluate"] and not status(project)
    assert v["released"] and v["compare"] == "evaluate.r2" and project.json("reports/metrics/evaluate.json")["r2"] > 0.2
    assert project.json("reports/metrics/export.json")["input_difference"] < 1e-5

def test_a_database_beside_it(tmp_path):
    "Its path is seen from the project, and DVC watches the file."
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE people (age, sick)")
        db.executemany("INSERT INTO people VALUES (?, ?)", [(20 + i % 50, ("no", "yes")[i % 3 == 0]) for i in range(60)])
    db.close()
    project, _ = new(tmp_path / "sick", "--from", "sqlite:///shop.db?table=people", "--target", "sick")
    assert "source: sqlite:///../shop.db?table=people " in (project / "params.yaml").read_text() and "../shop.db" in project.stages["ingest"]["deps"]

def test_refusals(photos, tmp_path):
    "One line, and nothing is left."
    (tmp_path / "full").mkdir(); (tmp_path / "full/x").touch(); (tmp_path / "one.csv").write_text("a,b\n1,2\n"); (tmp_path / "empty").mkdir()
    for folder, args, says in (("full", ["--from", photos], "not empty"), ("a", ["--from", "nowhere"], "neither"), ("a", ["--from", photos, "--target", "x"], "tables"),
                               ("a", ["--from", tmp_path / "one.csv"], ""), ("a", ["--from", tmp_path / "empty"], "is empty"), ("a", ["--from", "breast_cancer", "--target", "diagnose"], "diagnosis")):
        one_line(new(tmp_path / folder, *args, rc=1)[1], says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "one.csv"]
