"""The tables that the documents show are those that the committed runs make."""

import re

import pytest

import documents


@pytest.fixture(scope="module")
def made():
    return documents.all_tables()


def test_every_committed_table_is_what_its_runs_make(made):
    assert {"minilm/table1", "minilm_6_epochs/fig3"} <= made.keys()
    for place, text in made.items():
        assert (documents.RESULTS / f"{place}.md").read_text() == text, (
            f"{place}.md is not what its runs make: python bench/documents.py"
        )


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_tables(path, made):
    text = path.read_text()
    places = [place for _, place, _ in documents.PLACE.findall(text)]
    assert places and documents.filled(text, made) == text, f"{path.name} shows other tables: python bench/documents.py"


def test_every_table_has_a_place(made):
    text = "".join(path.read_text() for path in documents.DOCUMENTS)
    assert {place for _, place, _ in documents.PLACE.findall(text)} == made.keys()


def test_figures_are_those_of_the_tables(made):
    of = documents.sources(made)
    assert {path.stem for path in documents.FIGURES.glob("*")} == of.keys()
    for name, source in of.items():
        text = (documents.FIGURES / f"{name}.svg").read_text()
        assert text.startswith("<svg") and text.rstrip().endswith(documents.digest(source)), (
            f"{name}.svg shows other runs: python bench/documents.py"
        )


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.name)
def test_images_are_there(path):
    missing = [
        image for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text()) if not (path.parent / image).exists()
    ]
    assert not missing


def test_a_place_is_filled_and_what_stands_around_it_stays():
    made = {"a/table1": "**title**\n\n| new |\n"}
    document = "before\n<!-- a/table1 -->\n| old |\n<!-- end -->\nafter <!-- a/b --> <!-- end -->\n"
    assert (
        documents.filled(document, made)
        == "before\n<!-- a/table1 -->\n| new |\n<!-- end -->\nafter <!-- a/b --> <!-- end -->\n"
    )
    assert documents.filled(documents.filled(document, made), made) == documents.filled(document, made)
    with pytest.raises(ValueError, match="a place for b/table1, but bench/results has only a/table1"):
        documents.filled("<!-- b/table1 -->\n<!-- end -->\n", made)
