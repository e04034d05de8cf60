"""Pages to text, the sample, the exercises with numbers."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.corpus import Document, PageSet, documents, is_prose, sample_by_name
from recipes.data.number_text import number_documents
from recipes.data.page_text import join_blocks, page_blocks

SPHINX = """<html><head><title>x</title></head><body>
<div class="related" role="navigation"><ul><li>index</li></ul></div>
<div class="body" role="main"><h1>Joins<a class="headerlink" href="#j">¶</a></h1>
<div class="toctree-wrapper"><ul><li>elsewhere</li></ul></div>
<p>Queries can
  access <em>multiple</em> tables.</p>
<ul><li><p>one</p></li><li>two</li></ul>
<pre>SELECT *
  FROM weather;   </pre>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td></td><td>2</td></tr></table>
<script>var x = 1;</script></div><div class="footer">copyright</div></body></html>"""

OLD_STYLE = "<BODY><P>First<P>Second<UL><LI>a<LI>b</UL><P STYLE='display: none'>hidden</P><DL><DT>t<DD>d</DL></BODY>"


def text_of(page: str) -> str:
    return join_blocks(page_blocks(page))


def test_a_page_becomes_headings_paragraphs_lists_and_code() -> None:
    assert text_of(SPHINX) == (
        "Joins\n\nQueries can access multiple tables.\n\n- one\n- two\n\nSELECT *\n  FROM weather;\n\n"
        "a | b\n\n1 | | 2\n"
    )


def test_pages_without_end_tags_are_read_too() -> None:
    assert text_of(OLD_STYLE) == "First\n\nSecond\n\n- a\n- b\n\nt\n\nd\n"


def test_a_page_without_a_main_element_is_read_as_a_whole() -> None:
    assert text_of("<body><div><p>all</p></div><nav>menu</nav></body>") == "all\n"
    assert text_of("<body><p>out</p><main><p>in</p></main></body>") == "in\n"


def test_text_is_nfc_and_free_of_invisible_characters() -> None:
    assert text_of("<p>e\u0301\u200b\u00ad&nbsp;x\u00a0y</p>") == "\u00e9 x y\n"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="<>/abpli &;\"'=\n\u0301\u00a0é#x1", max_size=80))
def test_any_markup_gives_clean_text(html: str) -> None:
    text = text_of(html)
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]\n", text)
    assert unicodedata.is_normalized("NFC", text)


def write_pages(root: Path, pages: dict[str, str]) -> PageSet:
    for name, body in pages.items():
        path = root / "doc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<body>{body}</body>", encoding="utf-8")
    return PageSet("pkg", "doc", exclude=("*genindex*",))


def test_documents_are_named_ordered_unique_and_free_of_boilerplate(tmp_path: Path) -> None:
    shared = "<p>This sentence stands on every page of the manual.</p>"
    own = {f"s/{n}.html": f"{shared}<p>Page number {'abcdefgh'[n]} says something of its own.</p>" for n in range(8)}
    pages = write_pages(tmp_path, {**own, "copy.html": own["s/3.html"], "genindex.html": "<p>index of all things</p>"})
    found = documents(pages, tmp_path, min_bytes=10, max_bytes=1000)
    expected = ["pkg:copy.html", *(f"pkg:s/{n}.html" for n in (0, 1, 2, 4, 5, 6, 7))]
    assert [each.doc_id for each in found] == expected
    assert found[1].text == "Page number a says something of its own.\n"
    assert documents(pages, tmp_path, min_bytes=10, max_bytes=20) == []


def test_tables_of_figures_are_not_prose() -> None:
    assert is_prose("Queries can access multiple tables.\n")
    assert not is_prose("1 | 2 | 3\n4 | 5 | 6\n")
    assert not is_prose("same line again\n" * 10)


@given(st.lists(st.integers(1, 50), unique=True, max_size=20), st.integers(0, 300))
def test_the_sample_fits_and_does_not_depend_on_the_order(sizes: list[int], limit: int) -> None:
    found = [Document(f"d{size}", "x" * size) for size in sizes]
    drawn = sample_by_name(found, limit)
    assert sum(len(each.text) for each in drawn) <= limit
    assert drawn == sample_by_name(found[::-1], limit)
    assert [each.doc_id for each in drawn] == sorted(each.doc_id for each in drawn)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_exercise_has_the_right_answer(seed: int) -> None:
    lines = "".join(each.text for each in number_documents(60, seed=seed)).splitlines()
    kinds = {"copy": 0, "sum": 0, "count": 0}
    asked = ""
    for line in lines:
        if asked:
            assert line == asked
            asked = ""
        elif line.startswith("Repeat exactly: "):
            asked, kinds["copy"] = line.removeprefix("Repeat exactly: "), kinds["copy"] + 1
            if found := re.fullmatch(r"(\d)/(\d) = (0?\d\.\d{3})\.\.\.", asked):
                assert abs(int(found[1]) / int(found[2]) - float(found[3])) < 6e-4
        elif found := re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", line):
            assert int(found[1]) + int(found[2]) == int(found[3])
            kinds["sum"] += 1
        else:
            found = re.fullmatch(r"Count from (\d+) to (\d+): ([\d ]+)", line)
            assert found
            assert [int(each) for each in found[3].split()] == list(range(int(found[1]), int(found[2]) + 1))
            kinds["count"] += 1
    assert min(kinds.values()) > 100


def test_exercises_depend_on_the_seed_and_their_own_number_alone() -> None:
    assert number_documents(5, seed=1) == number_documents(9, seed=1)[:5]
    assert number_documents(5, seed=1) != number_documents(5, seed=2)
