"How the notebooks read: sizes of exported cells, line lengths, prose and tests a line of code. `python bench/notebooks.py [folder or notebook ...]`"
import ast
import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def quantile(values, q):
    "The value below which the share `q` lies; 0 where there is none."
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))] if values else 0


def lines_of(source):
    "Lines that hold something, without directives."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def branches(source):
    "if, for, while, except, comprehensions' ifs, conditional expressions, and, or."
    kinds = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.BoolOp)
    return sum(isinstance(node, kinds) for node in ast.walk(ast.parse(source)))


def figures(paths):
    "One row of the table."
    cells, code, tests, prose, lone = [], [], [], 0, 0
    n_branches = 0
    for path in paths:
        previous_export = False
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                prose += len(source.split())
                continue
            lines = lines_of(source)
            export = any(line.startswith("#| export") for line in source.splitlines())
            if export and any(line.startswith(("def ", "class ", "@", "    ")) for line in lines):
                cells.append(len(lines))
                lone += previous_export
                n_branches += branches(source)
            (code if export else tests).extend(lines)
            previous_export = export
    return {
        "cells": len(cells), "median": median(cells) if cells else 0, "p90": quantile(cells, 0.9), "max": max(cells, default=0),
        ">120": f"{sum(len(line) > 120 for line in code) / max(1, len(code)):.1%}",
        "prose/code": f"{prose / max(1, len(code)):.1f}", "test/code": f"{len(tests) / max(1, len(code)):.2f}",
        "test p90": quantile([len(line) for line in tests], 0.9), "branches/line": f"{n_branches / max(1, len(code)):.2f}",
        "without example": lone,
    }


def main():
    given = [Path(a) for a in sys.argv[1:]] or [ROOT / "nbs"]
    notebooks = [p for g in given for p in ([g] if g.is_file() else sorted(g.rglob("*.ipynb")))]
    library = [p for p in notebooks if not {"stages", ".ipynb_checkpoints"} & set(p.parts) and "default_exp" in p.read_text()]
    groups = {"all": library}
    for p in library:
        name = p.name if len(given) > 1 or given[0].is_file() or given[0].resolve() != ROOT / "nbs" else p.parent.name
        groups.setdefault(name, []).append(p)
    rows = {name: figures(paths) for name, paths in groups.items()}
    width = max(map(len, rows))
    print(" " * width, *(f"{k:>{max(7, len(k))}}" for k in rows["all"]))
    for name, row in rows.items():
        print(f"{name:<{width}}", *(f"{v!s:>{max(7, len(k))}}" for k, v in row.items()))
    print("\nLines of exported cells (median, 90 in 100, largest), share of their lines over 120 characters, words of prose and lines of "
          "tests\na line of code, length of test lines, branches a line, exported cells that follow another without an example between.")


if __name__ == "__main__":
    main()
