"""On the package index `mlkit` is a stranger's package, and our own name there is nobody's yet: nothing that a person reads may
tell them to install either from there."""
import re
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, Project

from mlkit.device import PACKAGES, add_command

INSTALL = r"(?:pip3?|pipx|uv tool|conda) install|(?:uv|poetry) add"
FOREIGN = re.compile(rf"(?:{INSTALL})\b[^\n`;|&()#,]*?(?<![\w./-])mlkit(?:-lifecycle)?(?![\w/-])")


def hints(text): # the commands in `text` that install a stranger's package
    return [m[0] for m in FOREIGN.finditer(text)]


def hints_in(files): # {file: commands}
    found = {}
    for f in files:
        try:
            text = f.read_text()
        except UnicodeDecodeError: # a picture, a wheel
            continue
        if commands := hints(text):
            found[f] = commands
    return found


@pytest.mark.parametrize("text", [
    "pip install mlkit", "run: pip install 'mlkit[dali]'", 'python -m pip install -U "mlkit==0.1.0"', "uv add mlkit",
    "pip install --quiet torch mlkit>=1", "pip3 install mlkit\n", "pipx install mlkit", "conda install -c x mlkit",
    "pip install 'mlkit-lifecycle[dali]'", "pip install mlkit-lifecycle==0.1.0", "uv add mlkit-lifecycle"])
def test_a_strangers_package_is_found(text):
    assert hints(text)


@pytest.mark.parametrize("text", [
    "pip install -e '/src/mlkit[gpu]' -c constraints.txt", "mlkit setup", "pip uninstall mlkit-lifecycle",
    "pip install './vendor/mlkit_lifecycle-0.1.0-py3-none-any.whl[dali]'", "pip install ./mlkit-lifecycle[gpu]",
    "`pip install -r requirements.txt` (the mlkit of this project)", "pip install -r requirements.txt, then mlkit setup",
    "pip install ./mlkit-1.0.whl", "pip uninstall mlkit", "pip install -e .\nmlkit repro"])
def test_other_commands_are_not(text):
    assert not hints(text)


def test_the_checkout_names_no_strangers_package():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and ROOT / name != Path(__file__)]
    assert len(files) > 50 and hints_in(f for f in files if f.is_file()) == {}


@pytest.mark.parametrize("origin", ["", ".", "/src/ml kit", "./vendor/mlkit_lifecycle-0.1.0-py3-none-any.whl"])
@pytest.mark.parametrize("what", ["", *sorted({package.add for package in PACKAGES.values()})])
def test_doctors_commands_name_no_strangers_package(what, origin):
    "What `mlkit doctor` and every refusal of an engine tell a person to type."
    command = add_command(what, origin)
    assert not hints(command) and command.startswith("pip install ") or (what, origin, command) == ("", "", "")


def pictures(folder):
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            cv2.imwrite(str(folder / label / f"{i}.png"), random.integers(0, 255, (16, 16, 3), np.uint8))
    return folder


def rows(folder):
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = [f"{a:.3f},{b:.3f},{'yes' if a > b else 'no'}" for a, b in random.normal(size=(200, 2))]
    (folder / "rows.csv").write_text("\n".join(["height,weight,tall", *lines]) + "\n")
    return folder / "rows.csv"


@pytest.mark.parametrize("data, options", [(pictures, []), (rows, ["--target", "tall"])])
def test_a_made_project_names_no_strangers_package(tmp_path, data, options):
    source = data(tmp_path / "data")
    Project(ROOT).run("mlkit", "new", tmp_path / "project", "--from", source, *options)
    files = [f for f in (tmp_path / "project").rglob("*") if f.is_file() and ".git" not in f.parts]
    assert len(files) > 10 and hints_in(files) == {}
