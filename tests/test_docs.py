"What the documents say about files is true: rooms, links and paths are there."
import json
import posixpath
import re

import pytest
from conftest import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def links_to_files(markdown):
    return [link for link in re.findall(r"\]\(([^)\s]+)", markdown) if not re.match(r"\w+:|#", link)]


def is_room(name):
    "A module, or a folder of modules."
    return (ROOT / f"mlkit/{name}.py").is_file() or (ROOT / f"mlkit/{name}").is_dir()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    "Every link to a file leads to one, and makes no detour."
    links = links_to_files(text(name))
    missing = [link for link in links if not ((ROOT / name).parent / link.split("#")[0]).resolve().exists()]
    assert not missing and [link for link in links if posixpath.normpath(link) != link.rstrip("/")] == []


def test_links_of_notebooks():
    "The prose of a notebook is read in its own folder; that of a stage in `reports`, where a run puts it."
    missing = {}
    for notebook in set((ROOT / "nbs").rglob("*.ipynb")) - set((ROOT / "nbs/stages").iterdir()):
        cells = json.loads(notebook.read_bytes())["cells"]
        prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        links = [link for link in links_to_files(prose) if not (notebook.parent / link.split("#")[0]).exists()]
        missing |= {notebook.relative_to(ROOT).as_posix(): links} if links else {}
    assert missing == {}


def test_where_things_live():
    "Each row of CONTRIBUTING's table names a room, a folder of notebooks, or a file."
    table = text("CONTRIBUTING.md").split("| you want to | room | how |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) >= 20
    lost = [room for _, room, _ in rows if not is_room(room.strip("`")) and not (ROOT / room.strip("`")).exists()]
    assert not lost
    named = [name for _, _, how in rows for name in re.findall(r"`(\w+/\w+)`", how)]
    assert named and not [name for name in named if not is_room(name)]


def test_decorators_of_the_table():
    "What the table calls a decorator is one that the room has."
    table = text("CONTRIBUTING.md").split("| you want to | room | how |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        for name in re.findall(r"`@(\w+)`", line):
            room = line.split("|")[2].strip().strip("`")
            assert re.search(rf"^(def )?{name}\b", (ROOT / f"mlkit/{room}.py").read_text(), re.MULTILINE), f"{room}: {name}"


def test_the_house():
    "README's tree names every room that has a folder, and no other."
    tree = text("README.md").split("nbs/  mlkit/")[1].split("nbs/stages/")[0]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert named == {p.name for p in (ROOT / "mlkit").iterdir() if (p / "__init__.py").is_file()}
    top = re.search(r"^  \(top\) +(.*)$", tree, re.MULTILINE)[1].split(" · ")
    assert not [room for room in top if not is_room(room)]


def test_rooms_in_the_readme():
    "`training/model` and others, in prose and tables."
    folders = "|".join(p.name for p in (ROOT / "mlkit").iterdir() if p.is_dir())
    rooms = re.findall(rf"`((?:{folders})/\w+)`", text("README.md"))
    assert rooms and not [room for room in rooms if not is_room(room)]
