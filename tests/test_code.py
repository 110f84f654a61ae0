"What no line of the product may hold: faults that only another machine would show."
import ast
import json

import pytest
from conftest import ROOT

PROCESSES = ("run", "Popen", "call", "check_call", "check_output")
AT = {"open": 3, "fdopen": 3, "TextIOWrapper": 1, "read_text": 0, "write_text": 1} # where `encoding` stands, by position
NO_TEXT = ("tarfile", "zipfile", "os", "fsspec") # modules whose `open` gives bytes


def name_of(call): # ("open", "tarfile") of `tarfile.open(…)`
    f = call.func
    if isinstance(f, ast.Attribute):
        return f.attr, getattr(f.value, "id", "")
    return getattr(f, "id", ""), ""


def mode_of(call, at): # the constant mode of a file; "r" where none is given
    given = {k.arg: k.value for k in call.keywords}.get("mode") or (call.args[at] if len(call.args) > at else None)
    return "r" if given is None else getattr(given, "value", "r")


def is_text_without_encoding(call):
    name, of = name_of(call)
    given = {k.arg for k in call.keywords}
    if "encoding" in given:
        return False
    if name in PROCESSES and of in ("", "subprocess"):
        return bool(given & {"text", "universal_newlines", "errors"})
    if name.endswith("TemporaryFile"):
        return "b" not in (mode_of(call, 0) if call.args or "mode" in given else "b")
    if name not in AT or (name, of) in {("open", module) for module in NO_TEXT}:
        return False
    is_method = name == "open" and isinstance(call.func, ast.Attribute) and of != "io" # of a Path
    if name in ("open", "fdopen") and "b" in mode_of(call, 0 if is_method else 1):
        return False
    return len(call.args) <= AT[name] - is_method


def without_encoding(code): # ["3: open(path)"]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [f"{call.lineno}: {ast.unparse(call)}" for call in calls if is_text_without_encoding(call)]


@pytest.mark.parametrize("code", [
    "open(path)", "open(path, 'a')", "open(path, mode='w')", "open(path, errors='replace')", "path.open()", "path.open('w')",
    "Path('a', 'b').read_text()", "path.write_text(text)", "path.read_text(errors='replace')", "os.fdopen(fd, 'w')",
    "io.open(path)", "io.TextIOWrapper(raw)", "subprocess.run(command, text=True)", "run(command, text=True)",
    "subprocess.Popen(command, universal_newlines=True)", "subprocess.check_output(command, errors='replace')",
    "tempfile.NamedTemporaryFile('w')", "TemporaryFile(mode='w+')"])
def test_text_without_an_encoding_is_found(code):
    assert without_encoding(code)


@pytest.mark.parametrize("code", [
    "open(path, 'rb')", "open(path, mode='ab')", "open(path, encoding='utf-8')", "open(path, 'w', -1, 'utf-8')",
    "path.open('rb')", "path.open('w', encoding='utf-8')", "path.read_text('utf-8')", "path.write_text(text, 'utf-8')",
    "path.read_bytes()", "os.open(path, flags)", "tarfile.open(path)", "io.TextIOWrapper(raw, 'latin-1')",
    "subprocess.run(command)", "subprocess.run(command, text=True, encoding='utf-8')", "stage.run(text=True)",
    "tempfile.NamedTemporaryFile()", "tempfile.NamedTemporaryFile('w', encoding='utf-8')"])
def test_other_calls_are_not(code):
    assert not without_encoding(code)


def test_every_text_has_its_encoding():
    "Else it is that of the machine: a file that one has written, another cannot read."
    found = {str(f.relative_to(ROOT)): without_encoding(f.read_bytes()) for f in (ROOT / "mlkit").rglob("*.py")}
    for f in (ROOT / "nbs/stages").glob("*.ipynb"):
        cells = json.loads(f.read_bytes())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        found[f.name] = [call for text in code for call in without_encoding(text)]
    assert len(found) > 100 and {f: calls for f, calls in found.items() if calls} == {}

def stored(code):
    "Names that a module gives a value, at its top, more than once."
    found = [x.id for node in ast.parse(code).body if isinstance(node, (ast.Assign, ast.AnnAssign))
             for t in getattr(node, "targets", None) or [node.target] for x in ast.walk(t) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
    return sorted({name for name in found if found.count(name) > 1})

def test_a_name_has_one_value():
    "Cells far apart in a notebook become one module: what the second one calls the same silently changes the first."
    assert stored("A = 1\nB, A = 2, 3\nc: int = 4") == ["A"] and stored("A = 1\nB = A\nd[A] = 2") == []
    twice = {str(p.relative_to(ROOT)): stored(p.read_text(encoding="utf-8")) for p in (ROOT / "mlkit").rglob("*.py") if p.name != "_modidx.py"}
    assert {p: names for p, names in twice.items() if names} == {}
