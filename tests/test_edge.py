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

WIRES = {"float64": "float64", "int64": "float64", "bool": "float64", "category": "str", "datetime": "datetime64[us]"}
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
        return pick(text, text, f"({text})", f"( {text}", f"{text})")
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
