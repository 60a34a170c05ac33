"""Writes the tables of bench/results into the documents that show them, and draws their figures:    python
bench/documents.py

A document marks a table's place with a line ``<!-- FOLDER/EXPERIMENT -->`` and the end of it with ``<!-- end -->``;
what stands between is made from bench/results/FOLDER/runs.jsonl. EXPERIMENT.md in that folder is written, too, and
docs/figures/FOLDER_EXPERIMENT.svg of what is a curve or a map.
"""

import argparse
import hashlib
import re
from pathlib import Path

from prequant_ext.study.error_map import FILE as ERROR_MAP_FILE
from prequant_ext.study.error_map import read_error_map
from prequant_ext.study.experiments import ERROR_MAP
from prequant_ext.study.figures import AXES, figure, heat_map
from prequant_ext.study.page import RUNS_FILE, read_studies
from prequant_ext.study.runner import read_runs
from prequant_ext.task_file import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLACE = re.compile(r"(<!-- ([\w.-]+/\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(folder: Path) -> dict[str, str]:
    """Experiment -> markdown, of a folder that prequant experiment wrote."""
    finished = read_runs(folder / RUNS_FILE)
    return {study.name: study.table(finished) for study in read_studies(folder)}


def all_tables(results: Path = RESULTS) -> dict[str, str]:
    """FOLDER/EXPERIMENT -> markdown."""
    folders = sorted(path.parent for path in results.glob(f"*/{RUNS_FILE}"))
    return {f"{folder.name}/{name}": text for folder in folders for name, text in tables(folder).items()}


def sources(made: dict[str, str], results: Path = RESULTS) -> dict[str, str]:
    """FOLDER_EXPERIMENT of each figure -> what it is drawn from, whose digest the figure carries: the table of a curve,
    the records of a map.
    """
    curves = {place.replace("/", "_"): text for place, text in made.items() if place.split("/")[1] in AXES}
    return curves | {
        f"{path.parent.name}_{ERROR_MAP}": path.read_text() for path in results.glob(f"*/{ERROR_MAP_FILE}")
    }


def digest(source: str) -> str:
    return f"<!-- drawn from sha256 {hashlib.sha256(source.encode()).hexdigest()} -->"


def drawings(folder: Path) -> dict[str, str]:
    """EXPERIMENT -> SVG."""
    finished, found = read_runs(folder / RUNS_FILE), read_error_map(folder)
    curves = {
        study.name: figure(study.name, study.plan, study.own(finished))
        for study in read_studies(folder)
        if study.name in AXES
    }
    return {name: drawn for name, drawn in curves.items() if drawn} | ({ERROR_MAP: heat_map(found[1])} if found else {})


def filled(document: str, made: dict[str, str]) -> str:
    """``document`` with its tables as they are in ``made``, but for their titles: a document has its own. Raises
    ValueError where ``made`` lacks one.
    """
    unknown = [place for _, place, _ in PLACE.findall(document) if place not in made]
    if unknown:
        raise ValueError(
            f"a document has a place for {', '.join(unknown)}, but bench/results has only {', '.join(made)}"
        )
    return PLACE.sub(lambda found: f"{found[1]}{made[found[2]].split(chr(10), 2)[2]}{found[3]}", document)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made = all_tables()
    for place, text in made.items():
        write_atomically(RESULTS / f"{place}.md", text.encode())
    for path in DOCUMENTS:
        write_atomically(path, filled(path.read_text(), made).encode())
    of = sources(made)
    FIGURES.mkdir(exist_ok=True)
    for folder in sorted(path.parent for path in RESULTS.glob(f"*/{RUNS_FILE}")):
        for name, drawn in drawings(folder).items():
            name = f"{folder.name}_{name}"
            write_atomically(FIGURES / f"{name}.svg", f"{drawn}{digest(of[name])}\n".encode())
    print(
        f"wrote {len(made)} tables, {len(of)} figures, "
        f"{' and '.join(str(path.relative_to(ROOT)) for path in DOCUMENTS)}"
    )


if __name__ == "__main__":
    main()
