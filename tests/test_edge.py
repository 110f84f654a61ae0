"`mlkit edge`: the folder answers without mlkit, as the server does; what is wrong is one line, and no folder."
import json
import shutil
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import one_line
from mlkit.cli import main
from mlkit.core import DataError
from mlkit.data.columns.numbers import CURRENCIES
from mlkit.data.columns.values import value_reader
from mlkit.data.contract import Contract, Feature
from mlkit.edge import alone, run
from mlkit.edge import write as writing
from mlkit.export.chain import OnnxChain
from mlkit.export.signature import Signature, Tensor, arrays
from mlkit.serving.enforce import Enforcer
from test_predict import Done

WIRES = {"float64": "float64", "int64": "float64", "bool": "float64", "category": "str", "text": "str", "datetime": "datetime64[us]"}
FORMS = {"float64": ("", ".", ",", ".$", ",€", ".%", ",()", ".$()", ".USD", ",kr."), "datetime": run.DATES}
BLANKS = ("", " ", "\t", "\xa0", "\u3000", "\x1c", "\ufeff")


def odd_values(n):
    "Values as files and programs have them: numbers and dates in many forms, words, and what is none of these."
    random = np.random.default_rng(7)
    pick = lambda *of: of[random.integers(len(of))]
    digits = lambda: str(random.integers(10 ** random.integers(1, 19)))
    def number():
        whole = pick(digits(), f"{random.integers(1e9):,}", f"{random.integers(1e9):,}".replace(",", pick(".", " ", "'", "’", "\xa0")), "12,34,567", "", "007")
        rest = pick("", "", f"{pick('.', ',')}{digits()[:4]}", ".", f"e{random.integers(-40, 40)}", f"E+{random.integers(9)}")
        sign, beside = pick("", "", "-", "+", "−", "- "), pick("", "", "€", "$", "%", "US$", "kr.", "Kč", "₿", *CURRENCIES[:3])
        text = pick(f"{sign}{whole}{rest}", f"{beside}{sign}{whole}{rest}", f"{sign}{beside} {whole}{rest}", f"{sign}{whole}{rest} {beside}")
        return pick(text, text, f"({text})", f"( {text}", f"{text})", f"-{text}", f"{text} $")
    def day():
        y, m, d = pick(1, 1899, 1970, 2024, 9999), random.integers(1, 14), random.integers(1, 33)
        name = pick("Jan", "FEB", "mar", "Xyz", "Dec")
        text = pick(f"{y:04}-{m:02}-{d:02}", f"{y}-{m}-{d}", f"{d}.{m}.{y}", f"{m}/{d}/{y}", f"{y}/{m:02}/{d:02}", f"{d:02}-{m:02}-{y}", f"{d} {name} {y}", f"{name} {d}, {y}")
        hour, minute, second = random.integers(27), random.integers(62), random.integers(75)
        clock = pick("", "", f"{pick('T', ' ', '  ', 'T ')}{hour:02}:{minute:02}{pick('', f':{second:02}', f':{second:02}.{digits()[:9]}', f':{second:02},5')}")
        return text + clock + (pick("", " pm", "AM", " Pm") if clock else "") + pick("", "", "Z", " UTC", "+02:00", "-0530", "+5", "+14", "z", "GMT")
    def word():
        return pick(*run.NULLS, "nil", "Missing", ".", "yes", "No", "T", "off", "1.0", "0.0", "Bonn", "2.00", "-3.0", "é", "x" * 70, "1_0", "１", "٥", "inf", "-Infinity", "nAn", "0x1", "1e400")
    def thing():
        x = float(random.normal()) * 10.0 ** random.integers(-12, 40)
        return pick(None, True, False, 0, 1, -7, 2**53 + 1, 2**63 - 1, -2**63, 2**70, 10**400, 0.0, -0.0, 1.0, 2.5, x, round(x, 3), float(round(x)), 1e16, 1e-5, float("nan"),
                    float("inf"), 3.5e38, [1], {"a": 1}, b"x", "\ud800", np.float32(1.5), np.int64(4), np.bool_(True), date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, 4),
                    datetime(1950, 1, 1, tzinfo=timezone(timedelta(hours=-5))))
    def one():
        made = pick(number, number, day, day, word, thing)()
        return f"{pick(*BLANKS)}{made}{pick(*BLANKS)}" if isinstance(made, str) and random.random() < 0.3 else made
    return [one() for _ in range(n)]


def read_by_mlkit(feature, wire, values): # 'refused', or the value as it travels
    x, refused = value_reader(feature, wire)(list(values))
    x = x.view(np.int64) if wire == "datetime64[us]" else x
    return ["refused" if i in refused else v for i, v in enumerate(x.tolist())]


def read_by_run(column, v):
    try:
        return column.read(v)
    except ValueError:
        return "refused"


def same(a, b): return a == b or a != a and b != b


@pytest.mark.parametrize("max_bad", [0, 0.5])
@pytest.mark.parametrize("dtype", WIRES)
def test_values_are_read_as_in_mlkit(dtype, max_bad):
    "Thousands of odd values, in each form of a column: `run.py` reads and refuses just what mlkit does."
    values, wire = odd_values(3000), WIRES[dtype]
    if dtype == "category": # a date is no category; no JSON has one
        values = [v for v in values if not isinstance(v, date)]
    for form in FORMS.get(dtype, ("",)):
        f = Feature(name="x", dtype=dtype, format=form, max_bad=max_bad)
        column = run.Column({"name": "x", "dtype": wire, "column": f.model_dump(mode="json", exclude_defaults=True)}, {})
        pairs = [(v, a, read_by_run(column, v)) for v, a in zip(values, read_by_mlkit(f, wire, values), strict=True)]
        assert [(v, a, b) for v, a, b in pairs if not same(a, b)][:5] == [], form
        read = sum(a != "refused" for _, a, _ in pairs)
        assert 50 < read and (max_bad or dtype == "category" or read < 2950), (form, read)
    for words in ({"categories": ("NA", "EU")}, {"not_missing": ("None", "?")}) if dtype == "category" else (): # a spelling of 'missing' that is a value
        f = Feature(name="x", dtype=dtype, **words)
        column = run.Column({"name": "x", "dtype": wire, "column": f.model_dump(mode="json", exclude_defaults=True)}, {})
        assert [read_by_run(column, v) for v in run.NULLS] == read_by_mlkit(f, wire, run.NULLS) != [""] * len(run.NULLS)


INPUTS = (Feature(name="age", dtype="float64", range=(0, 120), unit="years"), Feature(name="paid", dtype="float64", format=",€", nullable=True),
          Feature(name="calls", dtype="int64", max_bad=0.1), Feature(name="town", dtype="category", categories=("Bonn", "Ulm", "Oslo")),
          Feature(name="member", dtype="bool"), Feature(name="since", dtype="datetime", format="%d.%m.%Y", range=("2000-01-01", "2030-12-31")))


def test_refusals_are_the_servers():
    "Hundreds of rows with one or two odd values, and odd columns: the words of the gateway, or the same tensors."
    contract = Contract(task="regression", inputs=INPUTS, target=Feature(name="y", dtype="float64"))
    signature = Signature(tuple(Tensor(f.name, WIRES[f.dtype], (1,), f) for f in INPUTS), (), ("id",))
    enforcer = Enforcer(contract, signature)
    table = run.Table([t.to_dict() for t in signature.inputs], ["id"], contract.model_dump(mode="json", exclude_defaults=True))
    def by_mlkit(rows):
        try:
            sent = dict(zip((t.name for t, _ in signature.packs()), signature.pack(arrays(signature, rows))))
            enforcer.check(sent)
            return {n: x.tolist() for n, x in sent.items()}
        except DataError as e: return str(e)
    def by_run(rows):
        try: return {n: x.tolist() for n, x in table.tensors(rows, 1).items()}
        except run.Refused as e: return str(e)
    good = {"age": 41, "paid": "1.200,50 €", "calls": 3, "town": "Bonn", "member": "yes", "since": "5.1.2024"}
    odd, random = [v for v in odd_values(400) if not isinstance(v, date)], np.random.default_rng(1)
    said = []
    for v in odd:
        row = good | {str(n): v for n in random.choice(list(good), random.integers(1, 3), replace=False)}
        said.append((by_mlkit([good, row]), by_run([good, row]), row))
    for row in ({}, good | {"x": 1}, good | {"id": 1}, {f" {k} ": v for k, v in good.items()}, {**good, "age": {"years": 1}}, [1], good | {"town": "Bon"}, good | {"age": -1},
                good | {"since": "1.1.1999"}, good | {"age": None}, good | {"town": ""}, good | {"town": "x" * 99}, {"agee": 1}):
        said.append((by_mlkit([good, row]), by_run([good, row]), row))
    assert [(row, a, b) for a, b, row in said if repr(a) != repr(b)][:3] == []
    assert sum(isinstance(a, str) for a, _, _ in said) > 200 and sum(isinstance(a, dict) for a, _, _ in said) > 20


@pytest.fixture(scope="module")
def digits(finished, tmp_path_factory):
    "The folder of the finished project, written by the command."
    out, here = tmp_path_factory.mktemp("edge") / "camera", pytest.MonkeyPatch()
    with here.context() as m:
        m.chdir(finished.root)
        done = Done(CliRunner().invoke(main, ["edge", str(out)]))
    assert done.returncode == 0 and "65 answers and 1 refusal equal the server's exactly" in done.stdout, done.stdout + done.stderr
    return out


def alone_in(folder, *args, given=b""):
    "The folder's `run.py`, in a Python that has this project's packages, but not its path."
    done = subprocess.run([sys.executable, "-I", "-B", folder / "run.py", *map(str, args)], input=given, capture_output=True, timeout=300, env={})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_folder_answers_alone(digits, finished, tmp_path):
    "Pixels and a file get the answers of the graph in the project, and nothing but two packages is loaded."
    x = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.save(tmp_path / "x.npy", x)
    chain = OnnxChain(finished / "models/bundle/onnx")
    expected = chain.answers((x,))
    for given in ((tmp_path / "x.npy",), ()):
        rc, out, err = alone_in(digits, *given, given=(tmp_path / "x.npy").read_bytes())
        answers = [json.loads(line) for line in out.splitlines()]
        assert (rc, err, [a["answer"] for a in answers]) == (0, "", expected["answer"].ravel().tolist())
        assert [list(a["probabilities"].values()) for a in answers] == expected["probabilities"].tolist()
    cv2.imwrite(str(tmp_path / "x.png"), x[0])
    assert alone_in(digits, tmp_path / "x.png")[1] == json.dumps(answers[0]) + "\n"
    report = writing.asked_alone(digits, [x[0].tolist()])
    assert report["packages"] == ["numpy", "onnxruntime"] and report["answers"] == answers[:1] and 20 < report["memory_mb"] < 500
    kept = json.loads((digits / "edge.json").read_text())
    assert kept["bytes"] < 2_000_000 and 0 < kept["start_s"] < 60 and (digits / "requirements.txt").read_text().count("==") == 2
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=digits, timeout=60).returncode == 0
    assert (digits / "fused.onnx").read_bytes() == (finished / "models/bundle/onnx/fused.onnx").read_bytes()


def test_what_is_wrong_on_the_device_is_one_line(digits, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "x.npy").write_bytes(b"no array")
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((9, 9), np.uint8))
    for args, why in ((("none.npy",), "No such file"), ((tmp_path / "x.npy",), "is no .npy file"), ((tmp_path / "x.png",), "cannot be read as an image"),
                      ((tmp_path / "large.png",), "the image is uint8 [1, 9, 9, 1] where the model takes uint8 [n, 8, 8, 1]"), ((), "standard input: is no .npy file")):
        rc, out, err = alone_in(digits, *args)
        assert (rc, out, err.count("\n")) == (1, "", 1) and err.startswith("run.py: ") and why in err, err
    for name in ("fused.onnx", "contract.json", "signatures.json", "requirements.txt"):
        shutil.copytree(digits, broken := tmp_path / name)
        with open(broken / name, "ab") as f: f.write(b" ")
        rc, _, err = alone_in(broken, tmp_path / "x.npy")
        assert rc == 1 and f"{name}: was changed or damaged" in err and err.count("\n") == 1, err
        (broken / name).unlink()
        assert f"{name}: cannot be read" in alone_in(broken, tmp_path / "x.npy")[2]


def test_what_is_wrong_at_home_is_one_line(digits, finished, monkeypatch, tmp_path):
    "And no folder: where the answers differ, where another package would be needed, where something is there."
    monkeypatch.chdir(finished.root)
    ask = lambda out, *more: Done(CliRunner().invoke(main, ["edge", str(out), *more]))
    one_line(ask(digits), "is there already, and is not empty")
    one_line(ask(digits / "run.py"), "is there already")
    one_line(ask(tmp_path / "no/such"), "no such folder; make it first")
    one_line(ask(tmp_path / "x", "--alias", "nobody"), "nobody")
    with monkeypatch.context() as m:
        m.setattr(writing.Server, "answer", lambda self, sample: {"answer": "0"})
        one_line(ask(tmp_path / "x"), "where the server says", "do not ship it")
    text = (finished.root.parent / "other.py")
    text.write_text(open(run.__file__, encoding="utf-8").read().replace("import numpy as np", "import numpy as np, polars", 1))
    with monkeypatch.context() as m:
        m.setattr(run, "__file__", str(text))
        one_line(ask(tmp_path / "x"), "does not run without mlkit", "polars")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))
    assert alone.PACKAGES == ("numpy", "onnxruntime")
