"What `mlkit new` leaves for git and DVC, wherever it is called; no pipeline runs here."
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BIN, one_line
from dvc.repo import Repo
from test_new import Made, new, status

MARK = "made by 'mlkit new'"


def repository(folder):
    "A git repository with a commit, a change that is staged, and one that is not."
    folder.mkdir()
    project = Made(folder)
    project.git("init", "-q")
    (folder / "a.txt").write_text("1")
    (folder / ".gitignore").write_text("/scratch/\n")
    project.commit()
    (folder / "a.txt").write_text("2")
    (folder / "b.txt").write_text("3")
    project.git("add", "b.txt")
    return project


def log(project):
    "Author and subject of each commit, the last first."
    return project.git("log", "--format=%an: %s").stdout.splitlines()


def scm(folder):
    "The folder of the git repository that DVC uses, None: none."
    with Repo(str(folder)) as repo:
        return Path(repo.scm.root_dir) if type(repo.scm).__name__ == "Git" else None


def test_inside_a_repository(tmp_path):
    "The project is a part of it; what else is changed there is left alone."
    top = repository(tmp_path / "top")
    (top / "models").mkdir()
    project, _ = new(top / "models/dia", "--from", "diabetes")
    assert not (project / ".git").exists() and scm(project.root) == top.root
    assert status(top) == [" M a.txt", "A  b.txt"]
    committed = top.git("show", "--format=%s", "--name-only").stdout.splitlines()
    assert committed[0] == f"dia: {MARK}" and {name.split("/")[:2] == ["models", "dia"] for name in committed[2:]} == {True}


def test_in_an_ignored_folder(tmp_path):
    "Nothing in there can be committed, so the project is a repository of its own."
    top = repository(tmp_path / "top")
    (top / "scratch").mkdir()
    project, _ = new(top / "scratch/dia", "--from", "diabetes")
    assert scm(project.root) == project.root and len(log(project)) == 1 and len(log(top)) == 1


def test_a_hook_that_refuses(tmp_path):
    "The project is there, and a line says what to do."
    top = repository(tmp_path / "top")
    hook = top / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\necho 'run the tests first' >&2\nexit 1\n")
    hook.chmod(0o755)
    done = top.run("mlkit", "new", "dia", "--from", "diabetes")
    assert "the first commit was refused (run the tests first)" in done.stdout and (top / "dia/dvc.yaml").is_file()


@pytest.mark.parametrize("known", [True, False])
def test_whose_commit_it_is(tmp_path, known):
    "The person's whom git knows; nobody's is said, with the command that mends it."
    home = tmp_path / "home"
    home.mkdir()
    if known:
        (home / ".gitconfig").write_text("[user]\n\tname = Ada\n\temail = ada@example.com\n")
    bare = {k: v for k, v in Made(tmp_path).env.items() if not k.startswith(("GIT_", "EMAIL", "XDG_"))}
    env = bare | {"HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["mlkit", "new", "dia", "--from", "diabetes"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and ("git knows no user.email" in done.stdout) != known, done.stdout + done.stderr
    assert log(Made(tmp_path / "dia")) == [f"{'Ada' if known else 'mlkit'}: dia: {MARK}"]


def test_without_git(tmp_path):
    "A line says what to do once git is there; who does it has the same project."
    env = Made(tmp_path).env
    without = env | {"PATH": str(BIN)}
    assert not shutil.which("git", path=without["PATH"])
    done = subprocess.run(["mlkit", "new", "dia", "--from", "diabetes"], cwd=tmp_path, env=without, capture_output=True, text=True)
    assert done.returncode == 0 and scm(tmp_path / "dia") is None, done.stdout + done.stderr
    line, = (line for line in done.stdout.splitlines() if line.startswith("git is not installed"))
    project, remedy = Made(tmp_path / "dia"), line.partition("in the project: ")[2]
    assert remedy.startswith("git init && ")
    who = {f"GIT_{role}_{what}": "t" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(remedy, shell=True, cwd=project.root, env=env | who, check=True, capture_output=True)
    assert not status(project) and scm(project.root) == project.root
    assert "dvc.yaml" in project.git("ls-files").stdout and ".dvc/tmp" not in project.git("ls-files").stdout


def test_variables_of_a_hook(tmp_path):
    "git tells a hook by variables which repository is meant; the new project is another."
    top = repository(tmp_path / "top")
    hook = {"GIT_DIR": str(top / ".git"), "GIT_WORK_TREE": str(top.root), "GIT_INDEX_FILE": str(top / ".git/index")}
    command = ["mlkit", "new", tmp_path / "dia", "--from", "diabetes"]
    subprocess.run(command, cwd=top.root, env=top.env | hook, check=True, capture_output=True)
    made, = log(Made(tmp_path / "dia"))
    assert made.endswith(f": dia: {MARK}")
    assert len(log(top)) == 1 and status(top) == [" M a.txt", "A  b.txt"]


def test_source_is_relative(tmp_path):
    "However the path is written, `params.yaml` holds the same, and DVC watches what it names."
    table = tmp_path / "home/raw/people.csv"
    table.parent.mkdir(parents=True)
    table.write_text("age,sick\n" + "".join(f"{20 + i % 50},{('no', 'yes')[i % 3 == 0]}\n" for i in range(60)))
    here = tmp_path / "home/work"
    here.mkdir()
    os.symlink(table.parent, here / "link")
    env = Made(here).env | {"HOME": str(tmp_path / "home")}
    written = {"a": "~/raw/people.csv", "b": table, "c": "./link//people.csv"}
    for name, data in written.items():
        command = ["mlkit", "new", name, "--from", str(data), "--target", "sick"]
        subprocess.run(command, cwd=here, env=env, check=True, capture_output=True)
        project = Made(here / name)
        assert "  source: ../../raw/people.csv " in (project / "params.yaml").read_text()
        assert "${ingest.source}" in project.stages["ingest"]["deps"]


def test_not_in_its_own_data(tmp_path):
    (tmp_path / "photos").mkdir()
    one_line(new(tmp_path / "photos/mine", "--from", tmp_path / "photos", rc=1)[1], "name a folder outside")
    assert not list((tmp_path / "photos").iterdir())
