"What pip gets: the wheel that is built from the checkout, and the one that a made project carries."
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from mlkit.core import DISTRIBUTION, VENDOR
from mlkit.device import add_command
from mlkit.project.pin import pin, write_zip
from mlkit.project.stages import notebook_files

ELSEWHERE = {"triton_python_backend_utils"} # a module that exists only inside Triton
UNDECLARED = ELSEWHERE | {"cudf"} # it holds older versions of packages that mlkit needs; `mlkit doctor` says how to add it
PACKAGE_OF = {"nvidia": "nvidia-dali-cuda130", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "pyspark": "pyspark"}
OURS = next(p for p in sys.path if p.endswith("site-packages"))

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import mlkit
missing = []
for module in pkgutil.walk_packages(mlkit.__path__, "mlkit."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as e:
        missing.append(e.name)
print(json.dumps([mlkit.__file__, missing]))
"""


def run(*command, cwd=ROOT, rc=0, **env):
    "Raises `AssertionError` with the output where the exit code is not `rc`."
    here = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == rc, f"{command} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def contents(wheel):
    "Name in the wheel: its bytes."
    with ZipFile(wheel) as z:
        return {name: z.read(name) for name in z.namelist()}


def a_wheel(folder, version, code, package="mlkit", name=DISTRIBUTION):
    "A wheel of a name, ours say, whose package is somebody's."
    start = f"{name.replace('-', '_')}-{version}"
    info = f"{start}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{package}/__init__.py": code, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": ""}
    return write_zip(folder / f"{start}-py3-none-any.whl", {k: v.encode() for k, v in files.items()})


class Bare:
    "An environment of its own; what mlkit requires comes from ours, what pip installs goes into this one."

    def __init__(self, folder):
        self.python = folder / "bin/python"
        run(sys.executable, "-m", "venv", "--without-pip", folder)

    def pip(self, *args, cwd=ROOT, rc=0):
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--disable-pip-version-check"]
        return run(*command, "--no-deps", "--no-index", *args, cwd=cwd, rc=rc)

    def code(self, code, cwd=ROOT):
        return run(self.python, "-c", code, cwd=cwd, PYTHONPATH=OURS).stdout

    @property
    def installed(self):
        "The packages that it has."
        return sorted(p.name for p in self.python.parents[1].glob("lib/*/site-packages/*"))


def imported(code):
    "The packages outside Python that a text imports, wherever the line stands."
    nodes = list(ast.walk(ast.parse(code)))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {name.split(".")[0] for name in whole | parts}
    return tops - sys.stdlib_module_names - {"mlkit"}


def normal(name):
    "The one spelling of a distribution's name."
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras=True):
    "The distributions that pyproject.toml names for this platform."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    return {normal(r.name) for r in map(Requirement, project["dependencies"] + optional * extras) if not r.marker or r.marker.evaluate()}


def undeclared(packages, known):
    "The packages of which no distribution is in `known`."
    installed = packages_distributions()
    def names(package):
        return {normal(n) for n in [*installed.get(package, []), PACKAGE_OF.get(package, package)]}
    return {package for package in packages - UNDECLARED if not names(package) & known}


@pytest.fixture
def bare(tmp_path):
    return Bare(tmp_path / "bare")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from the checkout by the build backend."
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, ".")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    "The folder of a project that has the wheel of this mlkit in `vendor`, and names it."
    folder = tmp_path_factory.mktemp("pinned")
    pin(folder)
    return folder


@pytest.mark.parametrize("code, names", [
    ("import threadpoolctl", {"threadpoolctl"}), ("import os, scipy.stats as s", {"scipy"}),
    ("from sklearn.svm import SVC", {"sklearn"}),
    ("def f():\n    with a:\n        from IPython.display import display", {"IPython"}), ("from . import core", set()),
    ("from ..core import sha256\nfrom mlkit.core import nearest", set())])
def test_imports_are_found(code, names):
    assert imported(code) == names


def test_undeclared_packages_are_found():
    known = {"scikit-learn", "opencv-python-headless", "nvidia-dali-cuda130"}
    assert undeclared({"sklearn", "cv2", "nvidia", "threadpoolctl", "jinja2"}, known) == {"threadpoolctl", "jinja2"}


def test_every_import_is_declared():
    "What another package happens to bring today, it may drop tomorrow."
    code = [p.read_text(encoding="utf-8") for p in (ROOT / "mlkit").rglob("*.py")]
    for notebook in notebook_files().values():
        cells = json.loads(notebook.read_bytes())["cells"]
        code += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    packages = set().union(*map(imported, code))
    assert {"torch", "IPython", "nvidia"} <= packages and undeclared(packages, declared()) == set()


def test_what_is_required_is_pinned():
    "constraints.txt holds the version of everything that an installation needs."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(line.split("==")[0]) for line in lines if "==" in line}
    assert declared(extras=False) - pins == set()


def test_wheel_holds_all(wheel):
    "Every module, every stage notebook, the licence, the marker for type checkers; no tests, nothing compiled."
    files = contents(wheel)
    ours = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT / "mlkit").rglob("*.py")}
    assert "mlkit/flow/runner.py" in ours and ours.items() <= files.items()
    stages = {f"mlkit/notebooks/{name}": p.read_bytes() for name, p in notebook_files().items()}
    assert "mlkit/notebooks/train.ipynb" in stages and stages.items() <= files.items()
    assert files["mlkit/py.typed"] == b""
    licence, = [text for name, text in files.items() if name.endswith(".dist-info/licenses/LICENSE")]
    assert licence == (ROOT / "LICENSE").read_bytes() and b"Apache License" in licence
    assert not [name for name in files if name.endswith(".pyc") or name.startswith(("tests/", "nbs/", "bench/"))]


def test_wheel_works_alone(wheel, bare, tmp_path):
    "Installed somewhere else, every module can be imported, and a project would get the notebooks of the wheel."
    bare.pip(wheel)
    file, missing = json.loads(bare.code(IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    site = bare.python.parents[1]
    assert Path(file).is_relative_to(site) and set(missing) <= ELSEWHERE
    found = bare.code("from mlkit.project.stages import notebook_files; print(*notebook_files().values())", cwd=tmp_path)
    assert found and all(Path(p).is_relative_to(site) for p in found.split())
    assert (site / "bin/mlkit").is_file()


def test_editable_installation_copies_no_notebook(tmp_path):
    "A copy beside the checkout would grow old."
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    files = contents(tmp_path / run(sys.executable, "-c", code).stdout.split()[-1])
    assert not [name for name in files if name.startswith("mlkit/") or name.endswith(".ipynb")], sorted(files)


def test_pinned_wheel_is_the_built_one(wheel, pinned):
    "What a project carries has the same package as what the build backend makes."
    def package(files):
        return {name: text for name, text in files.items() if name.startswith("mlkit/")}
    carried, = (pinned / "vendor").iterdir()
    assert package(contents(carried)) == package(contents(wheel))


def test_pin_installs(pinned, bare, tmp_path):
    "pip takes the file, and what it has installed would pin itself by the same hash."
    bare.pip("-r", "requirements.txt", cwd=pinned)
    assert "mlkit" in bare.installed
    (again := tmp_path / "again").mkdir()
    bare.code("from pathlib import Path; from mlkit.project.pin import pin; pin(Path.cwd())", cwd=again)
    assert (again / "requirements.txt").read_text() == (pinned / "requirements.txt").read_text()


@pytest.mark.parametrize("fault", ["changed", "cut short", "another version", "gone", "no folder"])
def test_pin_stops(fault, pinned, bare, tmp_path):
    "pip stops, and never takes a package of our name that somebody else has made."
    project, strangers = tmp_path / "project", tmp_path / "strangers"
    shutil.copytree(pinned, project)
    a_wheel(strangers, "99.0", "STRANGER = True")
    file, = (project / "vendor").iterdir()
    if fault == "changed":
        a_wheel(project / "other", file.name.split("-")[1], "STRANGER = True").replace(file)
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "another version":
        a_wheel(project / "vendor", "99.0", "STRANGER = True")
        file.unlink()
    elif fault == "gone":
        file.unlink()
    else:
        shutil.rmtree(project / "vendor")
    done = bare.pip("-r", "requirements.txt", "--find-links", strangers, "--find-links", "vendor", cwd=project, rc=1)
    says = "DO NOT MATCH THE HASHES" if fault in ("changed", "cut short") else f"No such file or directory: './vendor/{file.name}'"
    assert says in done.stderr and bare.installed == []


def test_an_extra_of_a_made_project(pinned, bare, tmp_path):
    "The command that doctor gives there installs the extra, without an index for mlkit, and asks no stranger."
    wheel, = (pinned / VENDOR).iterdir()
    a_wheel(tmp_path, "2.5", "DALI = True", "nvidia/dali", "nvidia-dali-cuda130")
    a_wheel(tmp_path, "99.0", "STRANGER = True")
    bare.code(f"import sysconfig; open(sysconfig.get_path('purelib') + '/ours.pth', 'w').write({OURS!r})")
    command = shlex.split(add_command("[dali]", f"./{VENDOR}/{wheel.name}"))
    assert command[:2] == ["pip", "install"]
    pip = [sys.executable, "-m", "pip", "--python", bare.python, "install", "--disable-pip-version-check"]
    run(*pip, "--no-index", "--find-links", tmp_path, *command[2:], cwd=pinned)
    assert {"nvidia", f"{wheel.name.split('-py3')[0]}.dist-info"} <= set(bare.installed)
    assert not [name for name in bare.installed if "99.0" in name]
