"""The normal form: what a build key covers of a recipe file, and what a build imports."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpstore.errors import RecipeRefused
from vpstore.schema.normal_form import normal_form

ROOT = Path(__file__).resolve().parents[2]

COMMENTED = b'''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""The module."""
"and what would be its docstring now"

import os  # for getpid


def one():  # with a comment
    """Alone: something must stay."""


class Two:
    "first"; x = 1

    # between

    def three(self): "on the line"

    def four(self):
        ("in brackets"
         # and a comment
         " twice")
        return ("# no comment", """
# none either

""", [
            1,  # one

            # two
            2,
        ])


value = 1 + \\
    2
last = "a"  \\
    # after a backslash
'''
NORMAL = b'''import os
def one():
    pass
class Two:
    x = 1
    def three(self): pass
    def four(self):
        return ("# no comment", """
# none either

""", [
            1,
            2,
        ])
value = 1 + \\
    2
last = "a"  \\

'''


def test_comments_docstrings_and_blank_lines_go_and_nothing_else() -> None:
    found = normal_form(COMMENTED, where="x.py")
    assert found.data == NORMAL
    lines = COMMENTED.split(b"\n")
    for number, line in zip(found.lines, found.data.split(b"\n"), strict=False):
        assert line.split()[:1] == [b"pass"] or line.strip()[:5] in lines[number - 1]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (b"", b""),
        (b"# nothing else", b""),
        (b'"""doc"""', b""),
        (b"x = 1\r\ny = '''a\r\nb'''\r\n", b"x = 1\ny = '''a\nb'''\n"),
        (b"def f():\n    'a'; 'b'; return 1\n", b"def f():\n    return 1\n"),
        (b"def f():\n    'a';\n    'b'  # c\n", b"def f():\n    pass\n"),
        (b"async def f():\n\t'''a\n\n\tb'''\n\n\tawait g()\n", b"async def f():\n\tawait g()\n"),
        (b"def f():\n    b'bytes'\n    f'{x}'\n", b"def f():\n    b'bytes'\n    f'{x}'\n"),
        (b"x = 1\n'no docstring'\n", b"x = 1\n'no docstring'\n"),
        ("é = '#'  # é\n".encode(), "é = '#'\n".encode()),
        (b"x = 1  \n", b"x = 1  \n"),  # formatting stays
    ],
)
def test_small_cases(text: bytes, normal: bytes) -> None:
    assert normal_form(text, where="x.py").data == normal


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"\xef\xbb\xbfx = 1\n", "byte order mark"),
        (b"# coding: latin-1\nx = 1\n", "latin-1"),
        (b"x = '\xff'\n", "utf-8"),
        (b"x = 1\ry = 2\n", "carriage return"),
        (b"def f(:\n", "invalid syntax"),
    ],
)
def test_what_python_may_read_otherwise_is_refused(text: bytes, found: str) -> None:
    with pytest.raises(RecipeRefused) as caught:
        normal_form(text, where="x.py")
    assert found in caught.value.found


def plain(tree: ast.Module) -> str:
    """A syntax tree without the string statements that lead a body."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            body = list(node.body)
            while body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                if not isinstance(body[0].value.value, str):
                    break
                del body[0]
            node.body = body or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


def sampled(folder: Path, count: int) -> Iterator[Path]:
    """Some files of a folder, the same ones each time."""
    paths = sorted(path for path in folder.rglob("*.py") if path.stat().st_size < 60_000)
    yield from random.Random(7).sample(paths, min(count, len(paths)))


def test_the_syntax_tree_stays_but_for_docstrings() -> None:
    places = [ROOT / "recipes", Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    tried = 0
    for path in [path for place in places for path in sampled(place, 25)]:
        data = path.read_bytes()
        try:
            before = ast.parse(data.replace(b"\r\n", b"\n"))
            found = normal_form(data, where=str(path))
        except (SyntaxError, ValueError, RecipeRefused):
            continue
        tried += 1
        assert plain(ast.parse(found.data)) == plain(before), path
        assert normal_form(found.data, where=str(path)).data == found.data, path
        assert len(found.lines) == found.data.count(b"\n") + (found.data[-1:] not in (b"\n", b"")), path
    assert tried > 60


OTHERS = [f"python3.{minor}" for minor in (12, 13, 14) if sys.version_info[1] != minor]
DIGEST = """
import hashlib, sys
from pathlib import Path
from vpstore.schema.normal_form import normal_form
for path in sorted(Path("recipes").rglob("*.py")):
    print(path, hashlib.sha256(normal_form(path.read_bytes(), where=str(path)).data).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_python_gives_the_same(name: str) -> None:
    try:
        other = subprocess.run([name, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {name} here")
    if other.returncode and "Error" not in other.stderr:
        pytest.skip(f"no {name} here")
    own = subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (other.stdout, other.stderr) == (own.stdout, own.stderr)
