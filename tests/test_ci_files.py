"CI for a made project: the files pass their schemas, and each step's shell runs from a clean clone with a DVC remote."
import json
import os
import re
import subprocess
import sysconfig
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import BIN, ROOT, one_line, wait_for
from mlkit.cli import command_names, load_command
from mlkit.project.ci import JOBS, PLATFORMS, SCRIPTS, ci_files
from test_new import Made, new, releases_of_a_shop

SCHEMAS = {"github": ("vendor.github-workflows", "runs-on:"), "gitlab": ("vendor.gitlab-ci", "when: manual")} # and what must be right


class Runner(Made):
    "A machine of CI: a clean clone, whose mlkit is the wheel in vendor/. What else pip would fetch is that of the tests."
    @property
    def env(self):
        home = {"HOME": str(self.root.parent), "XDG_CONFIG_HOME": str(self.root.parent / "config"), "GIT_CONFIG_NOSYSTEM": "1"}
        pip = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": sysconfig.get_path("purelib")}
        shared = {"MLKIT_SERVING": str(BIN.parent / "serving"), "JUPYTER_PATH": str(self.root.parent / "jupyter")}
        return super().env | home | pip | shared | self.said

    def step(self, *command, rc=0, **env):
        "Run a script of ci/."
        return type(self)(self.root, self.said | env).run(*command, rc=rc)


@pytest.fixture(scope="module")
def origin(shared, tmp_path_factory):
    "A repository of a project that has run, with CI; its DVC remote, and its registry."
    top = tmp_path_factory.mktemp("ci")
    shop = shared("shop", releases_of_a_shop, Made)
    said = shop.mlkit("ci", "github").stdout
    assert said.startswith("wrote .github/workflows/mlkit.yml\nwrote ci/install\n")
    shop.dvc("remote", "add", "-q", "-d", "store", top / "store")
    shop.dvc("push", "-q", "--run-cache")
    shop.commit()
    shop.git("init", "-q", "--bare", "-b", "main", top / "origin.git")
    shop.git("push", "-q", top / "origin.git", "HEAD:main")
    return top / "origin.git", f"sqlite:///{shop.root}/mlflow.db"

def cloned(origin, folder):
    git, registry = origin
    (folder.parent / "jupyter").mkdir(exist_ok=True)
    (folder.parent / "jupyter/nbconvert").symlink_to(BIN.parent / "share/jupyter/nbconvert") # templates; kernels are the clone's own
    subprocess.run(["git", "clone", "-q", git, folder], check=True)
    return Runner(folder, {"MLFLOW_TRACKING_URI": registry})

@pytest.fixture(scope="module")
def runner(origin, tmp_path_factory):
    "A clone in which the first steps have run, up to the verdict."
    clone = cloned(origin, tmp_path_factory.mktemp("runner") / "shop")
    clone.step("ci/install")
    assert (clone / ".venv/bin/mlkit").is_file()
    where = clone.run(".venv/bin/python", "-c", "import mlkit; print(mlkit.__file__)").stdout
    assert where.startswith(str(clone / ".venv")), "the clone runs its own wheel"
    clone.step("ci/data", DVC_CONFIG_LOCAL="[core]\n    checksum_jobs = 2")
    assert oct((clone / ".dvc/config.local").stat().st_mode)[-3:] == "600"
    done = clone.step("ci/reproduce")
    assert "up to date" in done.stdout and "Released" in done.stdout, "what the remote has need not run"
    yield clone
    for p in clone.processes():
        p.kill()


@pytest.mark.parametrize("platform", SCHEMAS)
def test_the_files_pass_their_schemas(platform, tmp_path):
    path, (schema, needed) = tmp_path / "ci.yml", SCHEMAS[platform]
    text = ci_files(platform)[PLATFORMS[platform][0]]
    for content, rc in ((text, 0), (text.replace(needed, needed.replace("n", "m")), 1)):
        path.write_text(content)
        done = subprocess.run(["check-jsonschema", "--builtin-schema", schema, path], capture_output=True, text=True)
        assert done.returncode == rc, done.stdout + done.stderr


def test_the_jenkinsfile_is_declarative():
    "No Groovy here to read it: blocks are balanced, each stage has what a stage needs, and no command is looked into by Groovy."
    text = ci_files("jenkins")["Jenkinsfile"]
    code = "\n".join(line for line in text.splitlines() if not line.startswith("//"))
    depth, bare = 0, re.sub(r"'[^'\n]*'", "''", code)
    for mark in re.findall("[{}]", bare):
        depth += 1 if mark == "{" else -1
        assert depth >= 0
    assert depth == 0 and bare.count("(") == bare.count(")") and code.startswith("pipeline {\n    agent none\n")
    stages = re.split(r"\n        stage\('", code)[1:]
    assert [s.partition("'")[0] for s in stages] == [job.name for job in JOBS]
    for s in stages:
        assert [s.count(f"\n            {part} {{") for part in ("when", "agent", "options", "steps")] == [1] * 4, s
    assert all(line.strip().startswith("sh '") for line in code.splitlines() if "ci/" in line)


def test_each_platform_runs_the_same_steps():
    for platform, (path, _) in PLATFORMS.items():
        text = ci_files(platform)[path]
        assert set(re.findall(r"\bci/[a-z]+", text.partition("name: mlkit\n")[2] or text)) - {"ci/"} <= set(SCRIPTS), platform
        for job in JOBS:
            assert all(step in text for step in job.steps), (platform, job.name)
    asked = {tuple(m.split()[:1 + (m.split()[0] == "rollout")]) for text in SCRIPTS.values() for m in re.findall(r"(?m)^ *mlkit (.+)$", text)}
    assert ("repro",) in asked and ("rollout", "start") in asked
    for command, *inner in asked:
        assert command in command_names(), command
        assert all(name in load_command(command).commands for name in inner)
    assert any("--when" in p.opts for p in load_command("retrain").params)


def test_no_secret_reaches_a_fork_or_a_log():
    "A pull request's job has no address of the registry, a fork's has no secret at all, and no script traces what it does."
    test, verdict = (job for job in JOBS if "change" in job.on)
    assert not test.secrets and verdict.own and not any(name.startswith("MLFLOW") for name in verdict.secrets)
    workflow = ci_files("github")[PLATFORMS["github"][0]]
    assert "pull_request_target" not in workflow and "permissions: {}" in workflow
    assert not re.search(r"run: .*\$\{\{", workflow), "what others write would be a part of the command"
    assert not any(re.search(r"set -\w*x|printenv|\benv$", text, re.M) for text in SCRIPTS.values())


def test_a_clean_clone_is_tested(runner):
    assert "Success" in runner.step("ci/test").stdout
    runner.replace("nbs/stages/serve.ipynb", "'serve'" if "'serve'" in (runner / "nbs/stages/serve.ipynb").read_text() else '\\"serve\\"', "'served'")
    assert runner.step("ci/test", rc=None).returncode, "dvc.yaml is not what the notebooks say"
    runner.git("checkout", "-q", ".")


def test_what_a_run_has_made_is_kept(runner, origin):
    head = ("git", "--git-dir", origin[0], "log", "-1", "--format=%s", "main")
    runner.step("ci/keep")
    before = runner.run(*head).stdout
    assert (runner / ".mlkit/better").read_text() == "false\n" and "[skip ci]" not in before, "nothing has changed"
    for made in "looks.jsonl", "reports/metrics/monitor.json", "params.yaml": # as a run leaves the first two; the last is a person's
        with (runner / made).open("a") as f:
            f.write("\n")
    runner.step("ci/keep")
    assert runner.run(*head).stdout == "A run of the pipeline [skip ci]\n"
    kept = runner.run("git", "show", "--name-only", "--format=%an", "HEAD").stdout.split()
    assert kept == ["mlkit", "looks.jsonl", "reports/metrics/monitor.json"]
    assert runner.git("status", "--porcelain").stdout == " M params.yaml\n"
    # another champion than that of the commit before
    champion = (runner / "champion.json").read_text()
    (runner / "champion.json").write_text(re.sub(r'("bundle": ")\w+', r"\g<1>0000", champion))
    runner.git("commit", "-qam", "another")
    (runner / "champion.json").write_text(champion)
    runner.step("ci/keep")
    assert (runner / ".mlkit/better").read_text() == "true\n"
    runner.git("reset", "-q", "--hard", "origin/main")


class Notes(BaseHTTPRequestHandler):
    "GitLab's notes on a merge request."
    def answer(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def read(self):
        self.server.asked.append((self.command, self.path, self.headers["PRIVATE-TOKEN"]))
        return parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()).get("body", [""])[0]

    def do_GET(self):
        self.read()
        self.answer(self.server.notes)

    def do_POST(self):
        self.server.notes.append({"id": 7, "body": self.read()})
        self.answer({}, 201)

    def do_PUT(self):
        self.server.notes[-1]["body"] = self.read()
        self.answer({})

    def log_message(self, *_): pass


def test_the_verdict_is_one_comment_on_gitlab(runner):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Notes)
    server.notes, server.asked = [{"id": 3, "body": "nice work"}], []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = {"CI_API_V4_URL": f"http://127.0.0.1:{server.server_port}/api/v4", "CI_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "9",
               "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main", "MLKIT_TOKEN": "s3cret"}
        verdict = runner / "reports/verdict.json"
        verdict.rename(aside := verdict.with_suffix(".aside"))
        said = [runner.step("ci/comment", **env)]
        assert server.notes[1]["body"].startswith("<!-- mlkit -->\n### No verdict\n")
        aside.rename(verdict)
        said.append(runner.step("ci/comment", **env))
        assert [n["id"] for n in server.notes] == [3, 7] and [a[0] for a in server.asked] == ["GET", "POST", "GET", "PUT"]
        assert "| evaluate.accuracy | " in server.notes[1]["body"] and "A: origin/main (" in server.notes[1]["body"]
        assert {(urlsplit(path).path, token) for _, path, token in server.asked} == {
            ("/api/v4/projects/5/merge_requests/9/notes", "s3cret"), ("/api/v4/projects/5/merge_requests/9/notes/7", "s3cret")}
        assert not any("s3cret" in done.stdout + done.stderr for done in said)
    finally:
        server.shutdown()
        server.server_close()


def stub(folder, name, text):
    "A program that writes down how it was called."
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/called\n{text}\n')
    path.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}

def calls(folder):
    return (folder / "called").read_text().splitlines()


def test_the_verdict_is_one_comment_on_github(runner, tmp_path):
    "`gh` edits its last comment; where there is none it fails, and writes the first."
    env = stub(tmp_path / "bin", "gh", '[ "$6" = "" ]') | {"GITHUB_BASE_REF": "main", "PULL_REQUEST": "12", "GH_TOKEN": "s3cret"}
    runner.step("ci/comment", **env)
    first = "gh pr comment 12 --body-file .mlkit/verdict.md"
    assert calls(tmp_path / "bin") == [f"{first} --edit-last", first]
    assert (runner / ".mlkit/verdict.md").read_text().startswith("<!-- mlkit -->\n### ")


@pytest.mark.parametrize("code, trained", [(0, True), (3, True), (4, True), (1, False), (2, False)])
def test_an_alert_trains_again_and_is_heard(origin, tmp_path, code, trained):
    "Too few rows are no alert; where the monitor failed, nothing is trained."
    clone = cloned(origin, tmp_path / "shop")
    env = stub(tmp_path / "bin", "mlkit", f'[ "$1" != monitor ] || exit {code}')
    clone.step("ci/watch", rc=0 if code == 3 else code, **env)
    assert calls(tmp_path / "bin") == ["mlkit monitor", "mlkit retrain --when drift"][:1 + trained]
    assert "nothing is kept" in clone.step("ci/keep").stdout and (clone / ".mlkit/better").read_text() == "false\n", "no verdict"


def test_the_new_champion_is_rolled_out(origin, tmp_path):
    "On the host that serves. A person ends the rollout here; the job has waited for it, and the history is in git."
    for name in "a", "b":
        (tmp_path / name).mkdir()
    ci, host = cloned(origin, tmp_path / "a/checkout"), Made(cloned(origin, tmp_path / "b/host").root)
    host.git("config", "user.email", "host@example.com")
    host.git("config", "user.name", "host")
    assert "MLKIT_PROJECT" in ci.step("ci/deploy", rc=1).stderr
    done = []
    given = {"MLKIT_PROJECT": str(host.root), "PYTHONPATH": str(ROOT)} # no environment of its own there
    job = Thread(target=lambda: done.append(ci.step("ci/deploy", rc=None, **given)))
    job.start()
    wait_for(lambda: (host / ".mlkit/rollout.json").exists() or done, "the rollout")
    assert not done, done[0].stdout + done[0].stderr
    host.mlkit("rollout", "abort", "--why", "not today")
    job.join(60)
    assert done[0].returncode == 4 and "is version 1" in done[0].stdout, done[0].stdout + done[0].stderr
    assert json.loads((host / ".mlkit/rollout.json").read_text())["state"]["plan"]["candidate"]["version"] == "2"
    pushed = host.run("git", "--git-dir", origin[0], "log", "-1", "--format=%s%n", "--name-only", "main").stdout.split("\n\n")
    assert pushed[0].strip() == "The rollout of the new champion [skip ci]" and "history.jsonl" in pushed[1]
    assert "not today" in host.run("git", "--git-dir", origin[0], "show", "main:history.jsonl").stdout


def test_with_a_new_project_and_in_one_line(tmp_path):
    project, _ = new(tmp_path / "eye", "--from", "digits", "--ci", "jenkins")
    assert {*project.git("ls-files").stdout.splitlines()} > {"Jenkinsfile", *SCRIPTS}
    assert "100755" in project.git("ls-files", "-s", "ci/keep").stdout
    one_line(new(tmp_path / "x", "--from", "digits", "--ci", "travis", rc=1)[1], "'travis'", "github, gitlab, jenkins")
    (project / "ci/test").write_text("mine\n")
    one_line(project.mlkit("ci", "jenkins", rc=1), "ci/test: there already", "--force")
    assert (project / "ci/test").read_text() == "mine\n" and not (tmp_path / "x").exists()
