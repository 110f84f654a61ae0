"Rows as they stand in a user's file get the notebook's answers: from the ONNX chain, and from a live server."
import csv
import json
import urllib.request
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Callable

import numpy as np
import polars as pl
import pytest

from mlkit.core import DataError
from mlkit.data.delimited import read_delimited
from mlkit.data.prepared import load_split
from mlkit.data.split import SPLITS, Split
from mlkit.evaluation.evaluate import predict
from mlkit.inputs.rows import Rows
from mlkit.export.chain import OnnxChain, export_onnx
from mlkit.triton_server.install import install_serving
from mlkit.export.parity import parity
from mlkit.triton_server.repository import write_repository
from mlkit.export.signature import arrays
from mlkit.triton_server.server import Triton
from mlkit.sources.registry import open_source
from mlkit.task import Task
from mlkit.training.run import Run, train_records

N = 150
TRAIN = {"model": {"name": "residual_mlp", "width": 8, "n_blocks": 1}, "optimizer": {"name": "adamw", "lr": 0.02},
         "schedule": {"name": "constant"}, "augment": None, "loss": {}, "n_epochs": 20, "batch_size": 32, "keep": "last",
         "device": "cpu", "precision": "32-true", "n_threads": 1, "seed": 0, "feed": "auto"}
WIDE, HARD = "\u3000", "\u00a0" # the white space of Japanese text, and of thousands that must not break


@dataclass
class Table:
    "A data set as a user has it."
    rows: list # dicts, as a program reads them from the file
    file: Callable # (folder, rows) -> the file
    wrong: dict # column: a value that ingest could not read
    target: str = "y"


def comma(folder, rows, delimiter=","):
    path = folder / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def semicolon(folder, rows): return comma(folder, rows, ";")


def parquet(folder, rows):
    path = folder / "table.parquet"
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.col("kind").cast(pl.Categorical))
    frame.write_parquet(path)
    return path


def json_lines(folder, rows):
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def draw(seed): # any of some things; a number, and the answer that follows from it
    rng = np.random.default_rng(seed)
    def any_of(*things): return things[rng.integers(len(things))]
    def number(low, high): return float(np.round(rng.uniform(low, high), 2))
    return any_of, number, lambda yes: "yes" if yes else "no"


def spaces():
    any_of, number, say = draw(1)
    def row():
        kind, size = any_of("A", "B", "two words"), number(0, 9)
        coat = any_of("{}", " {}", "{} ", "\t{} ", "{}" + HARD, WIDE + "{}")
        return {" kind": coat.format(kind), "size ": coat.format(size), "y": coat.format(say((kind == "A") == (size > 4)))}
    return Table([row() for _ in range(N)], comma, {"size ": "large"})


def null_words():
    any_of, number, say = draw(2)
    def gap(v): return any_of(v, v, v, v, any_of("", "NA", "n/a", "-", "?", "NULL", "None", " nan ", "#N/A"))
    def row():
        region, size = any_of("EU", "NA", "APAC"), number(-5, 5)
        return {"region": region, "size": gap(str(size)), "often": gap(any_of("low", "high")), "code": any_of(gap(str(size)), "."),
                "y": say((region == "NA") == (size > 0))}
    return Table([row() for _ in range(N)], comma, {"size": "n.a.", "code": "x1"})


def decimal_commas():
    any_of, number, say = draw(3)
    def german(v): return f"{v:,.2f}".translate(str.maketrans(",.", ".,"))
    def row():
        a, b = number(0.01, 5000), number(-1, 1)
        return {"amount": any_of("{}", " {}").format(german(a)), "ratio": any_of(f"{b:.2f}", f"{b:.3f}").replace(".", ","),
                "y": f"{a / 100 - 5 * b:.3f}".replace(".", ",")}
    return Table([row() for _ in range(N)], semicolon, {"amount": "1,234.50", "ratio": "0.5.1"})


def thousands():
    any_of, number, say = draw(4)
    def grouped(v, by): return f"{v:,.1f}".replace(",", by)
    def row():
        a, b, c = (number(1, 90_000) for _ in range(3))
        return {"english": grouped(a, ","), "french": f"{int(b):,}".replace(",", any_of(" ", HARD)), "swiss": grouped(c, any_of("'", "’")),
                "y": say(a + c > 2 * b)}
    return Table([row() for _ in range(N)], semicolon, {"english": "1.234,5", "swiss": "1'23.5"})


def currencies():
    any_of, number, say = draw(5)
    def row():
        a, b = number(0, 9000), number(-500, 500)
        euros = f"{a:,.2f}".translate(str.maketrans(",.", ".,"))
        return {"price": any_of("€ {}", "{} €", "{}€", " {}").format(euros), "gain": any_of("${}", "-${}", "$ {} ").format(f"{abs(b):,.2f}"),
                "code": any_of("EUR 5", "EUR 7.5", "8 EUR"), "y": say(a > 4000)}
    return Table([row() for _ in range(N)], semicolon, {"price": "£5,00", "gain": "€5.00", "code": "7 USD"})


def percents():
    any_of, number, say = draw(6)
    def row():
        a, b = number(0, 100), number(-3000, 3000)
        return {"share": any_of("{}%", "{} %", " {}%").format(a), "profit": f"({-b:,.2f})" if b < 0 else f"{b:,.2f}", "y": say(a / 100 + b / 3000 > 0.5)}
    return Table([row() for _ in range(N)], semicolon, {"share": "0.5", "profit": "(5"})


def dates():
    any_of, number, say = draw(7)
    def row():
        when = datetime(2020, 1, 1) + timedelta(minutes=int(number(0, 2_000_000)))
        german = any_of("{:%d.%m.%Y}", "{:%d.%m.%Y %H:%M}", " {:%d.%m.%Y %H:%M:%S}", "NA", "{0.day}.{0.month}.{0.year}").format(when)
        iso = any_of("{:%Y-%m-%d}", "{:%Y-%m-%dT%H:%M:%SZ}", "{:%Y-%m-%d %H:%M:%S.250+02:00}", "{:%Y-%m-%d %I:%M %p} ", "n/a", "{0.year}-{0.month}-{0.day}").format(when)
        return {"born": german, "seen": iso, "paid": any_of("{:%b %d, %Y}", "{:%b %d, %Y %H:%M}").format(when), "due": f"{when:%m/%d/%Y}",
                "y": say(when.hour < 12)}
    return Table([row() for _ in range(N)], semicolon, {"born": "2024-01-05", "seen": "05.01.2024", "paid": "soon", "due": "31/12/2024"})


def truths():
    any_of, number, say = draw(8)
    def row():
        a, b, c, d = (number(0, 1) > 0.5 for _ in range(4))
        return {"smoker": any_of("Yes", "yes ", "YES") if a else any_of("No", " no"), "fit": any_of("TRUE", "true") if b else "False", "on": "on" if c else "off",
                "ill": any_of("t", "") if d else "F", "y": str(round(3.0 * a - 2 * b + c * d, 1) + number(0, 0.2))}
    return Table([row() for _ in range(N)], comma, {"smoker": "perhaps", "fit": "2", "on": "an"})


def codes():
    any_of, number, say = draw(9)
    def row(i):
        grade, rooms = any_of("1", "2", "A"), int(number(1, 9))
        bare = {"1": any_of("1", "1.0"), "2": any_of("2.00", " 2")}.get(grade, grade)
        return {"": str(i), "zip": any_of("01234", "53111", "80331 "), "grade": bare, "rooms": any_of("{}", "{}.0", "+{}", " {}").format(rooms),
                "weight": any_of(f"{number(0, 5)}", f"{number(0, 5):.2e}") if number(0, 1) > 0.03 else "unknown!", "y": say((grade == "A") == (rooms > 4))}
    return Table([row(i) for i in range(N)], comma, {"rooms": "three"})


def stored():
    any_of, number, say = draw(10)
    def row():
        a, b = number(0, 100), int(number(0, 50))
        when = datetime(2021, 5, 1, tzinfo=timezone.utc) + timedelta(hours=b, seconds=a)
        return {"price": any_of(Decimal(str(a)), None), "kind": any_of("A ", "B", " B"), "born": date(1970 + b, 1 + b % 12, 3), "seen": when,
                "took": timedelta(seconds=a, minutes=b), "count": b, "half": a, "good": any_of(True, False, None), "open": time(b % 24, 30), "y": say(a > b)}
    wrong = {"price": "dear", "born": "soon", "count": 2.5, "half": float("inf"), "good": "perhaps", "kind": ["A"], "took": date(2020, 1, 1)}
    return Table([row() for _ in range(N)], parquet, wrong)


def nested():
    any_of, number, say = draw(11)
    def row():
        a, b = number(0, 10), int(number(0, 5))
        return {"id": f"u{number(0, 1e6)}", "home": {"city": any_of("Köln", "Bonn ", None), "size": any_of(a, int(a), None)},
                "pets": b, "member": any_of(True, False), "y": a + b}
    return Table([row() for _ in range(N)], json_lines, {"pets": "many", "member": 2})


TABLES = [spaces, null_words, decimal_commas, thousands, currencies, percents, dates, truths, codes, stored, nested]


@dataclass
class Trained:
    "A model of a data set, and what the notebook says of each row."
    table: Table
    file: Path
    task: Task
    positions: np.ndarray # (n,) of the rows that have an answer
    X: np.ndarray # (n, d) features, as `prepare` stored them
    said: np.ndarray # (n, k) answers of the notebook
    export: Path

    @property
    def chain(self): return OnnxChain(self.export)
    @property
    def rows(self): return [self.table.rows[i] for i in self.positions] # with the target and what is kept aside


def train(table, folder):
    file = table.file(folder, table.rows)
    came = Rows.ingest(open_source(file.as_posix(), folder), folder / "shards", None, table.target)
    rows, target, *_ = Rows.prepare(folder / "shards", came.contract, folder / "prepared", Split({"train": 0.7, "validation": 0.15, "test": 0.15}))
    task = Task(rows, target)
    run = Run(TRAIN, task, folder / "prepared", folder / "shards")
    list(train_records(run))
    net = run.net.eval()
    X = np.concatenate([load_split(folder / f"prepared/{s}.safetensors")[0] for s in SPLITS])
    positions = pl.concat([pl.read_parquet(folder / f"prepared/{s}.parquet", columns=["_row"]) for s in SPLITS])["_row"].to_numpy() - 1
    export_onnx(net, task, folder / "export", 20)
    return Trained(table, file, task, positions, X, predict(net, task, X), folder / "export")


@pytest.fixture(scope="module", params=TABLES, ids=lambda t: t.__name__)
def trained(request, tmp_path_factory):
    return train(request.param(), tmp_path_factory.mktemp(request.param.__name__))


def same(trained, answers):
    found = parity(trained.task, trained.said, answers)
    return found.max_difference < 1e-5 and found.agreement == 1


def test_the_data_set_says_something(trained):
    "Each column is read, not kept aside, and the answers depend on the rows; else nothing would be compared."
    kept_aside = {"y", "open", "id", "unnamed_1"}
    assert set(trained.task.input.aside) <= kept_aside, trained.task.input.aside
    assert len(trained.rows) > 0.9 * N and np.ptp(trained.said[:, 0]) > 0.01
    assert all(len(np.unique(x)) > 1 for x in trained.X.T)


def test_rows_of_the_file_get_the_answers_of_the_notebook(trained):
    features = trained.chain(trained.rows, steps=1)
    apart = np.abs(features - trained.X)
    worst = trained.task.input.features[apart.max(0).argmax()]
    assert apart.max() < 1e-5, (worst, trained.rows[apart.max(1).argmax()])
    assert same(trained, trained.chain(trained.rows))


def test_a_row_alone_is_read_as_among_others(trained):
    signature, rows = trained.chain.signatures.served, trained.rows[:60]
    alone = [np.concatenate(x) for x in zip(*(arrays(signature, [row]) for row in rows))]
    for t, a, b in zip(signature.inputs, alone, arrays(signature, rows), strict=True):
        assert np.array_equal(t.wire(a), t.wire(b), equal_nan=t.dtype != "str"), t.name


def test_other_forms_of_the_same_rows(trained):
    "The file as a frame of text, or of what is stored; columns; typed rows of the test split."
    if trained.file.suffix == ".csv":
        frame = pl.concat(read_delimited(trained.file))
    else:
        frame = pl.read_parquet(trained.file) if trained.file.suffix == ".parquet" else pl.read_ndjson(trained.file)
    frame = frame[trained.positions]
    assert same(trained, trained.chain(frame))
    flat = [dict(row) for row in trained.rows]
    if not any(isinstance(v, dict) for v in flat[0].values()):
        assert same(trained, trained.chain({k: [row[k] for row in flat] for k in flat[0]}))
    typed = trained.task.input.raw(trained.export.parent / "prepared", "test")
    said = trained.said[-len(typed):] # the last split
    for rows in (typed, typed.to_dicts(), trained.task.input.sent(typed)):
        assert parity(trained.task, said, trained.chain(rows)).max_difference < 1e-5


def test_what_ingest_cannot_read_is_refused_by_its_column(trained):
    for column, value in trained.table.wrong.items():
        rows = [trained.rows[0], trained.rows[1] | {column: value}]
        with pytest.raises(DataError, match=f"row 2: column '{column.strip()}' has ") as e:
            trained.chain(rows)
        assert "\n" not in str(e.value)


def test_what_may_be_bad_is_missing_as_in_training(tmp_path):
    found = train(codes(), tmp_path)
    assert any(row["weight"] == "unknown!" for row in found.rows)
    signature = found.chain.signatures.served
    row = found.rows[0]
    *_, weight = arrays(signature, [row | {"weight": v} for v in ("unknown!", "NA", "never seen")])
    assert np.isnan(weight).all()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    found = train(spaces(), folder)
    install_serving()
    with Triton(write_repository(found.export, folder / "repository", "spaces", max_batch_size=64)) as server:
        yield found, server


def test_a_live_server_gives_the_answers_of_the_notebook(live):
    trained, server = live
    assert same(trained, server.client.predict_rows(trained.rows))


def test_answers_carry_the_names_of_the_classes(live):
    trained, server = live
    for said, answer in zip(trained.said[:20], server.client.answer_rows(trained.rows[:20])):
        assert answer["answer"] == ("no", "yes")[said.argmax()]
        assert np.allclose(list(answer["probabilities"].values()), said, atol=1e-5) and [*answer["probabilities"]] == ["no", "yes"]


def ask(server, kind, size=3.0, **parameters): # as a client in another language does: nothing is read before it is sent
    tensors = [{"name": "texts", "datatype": "BYTES", "shape": [1, 1], "data": [kind]}, {"name": "numbers", "datatype": "FP64", "shape": [1, 1], "data": [size]}]
    outputs = {"outputs": [{"name": "probabilities", "parameters": parameters}]} if parameters else {}
    body = json.dumps({"inputs": tensors} | outputs).encode()
    with urllib.request.urlopen(f"http://{server.url}/v2/models/{server.name}/infer", body, timeout=30) as r:
        return {t["name"]: t["data"] for t in json.loads(r.read())["outputs"]}


def test_tensors_that_nobody_has_read(live):
    "What the documentation says of clients without `arrays`: text that is not as the contract lists it is unknown. Names come with `classification`."
    _, server = live
    said, *others = (ask(server, kind) for kind in ("A", "A ", "unheard of"))
    known, (dirty, unknown) = said["probabilities"], (o["probabilities"] for o in others)
    assert said["answer"] == [("no", "yes")[np.argmax(known)]]
    assert np.allclose(dirty, unknown) and not np.allclose(known, unknown)
    assert np.allclose(server.client.predict_rows([{"kind": "A ", "size": "3.0"}])[0], known, atol=1e-5)
    best, other = ask(server, "A", classification=2)["probabilities"]
    assert {best.split(":")[2], other.split(":")[2]} == {"no", "yes"} and float(best.split(":")[0]) == pytest.approx(max(known), abs=1e-5)
