r"""The normal form of a Python file: the code without comments, docstrings and blank lines.

Place in the path: under the code closure. A build key covers the normal form of each recipe file, and a build imports
exactly that, so code that looks at itself (`__doc__`, line numbers, `inspect`) sees what the key covers.
Invariants: pure; spans of text are cut and nothing is printed anew, so every Python gives the same bytes; the syntax
tree stays what it was but for docstrings; the normal form of a normal form is itself.

Example:
    >>> normal_form(b'x = 1  # one\n', where="x.py").data
    b'x = 1\n'
"""

from __future__ import annotations

import ast
import re
import tokenize
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

from vpstore.errors import RecipeRefused

_BOM: Final = b"\xef\xbb\xbf"
_COOKIE: Final = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")  # PEP 263, in the first two lines
_UTF8: Final = re.compile(r"utf[-_]?8")
_BEGIN_FORMATTED: Final = frozenset({"FSTRING_START", "TSTRING_START"})  # from 3.12 and 3.14 on
_END_FORMATTED: Final = frozenset({"FSTRING_END", "TSTRING_END"})
_SILENT: Final = frozenset({tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER})
_MARGIN: Final = frozenset({tokenize.NL, tokenize.COMMENT})
_BLOCKS: Final = ("body", "orelse", "finalbody", "handlers", "cases")
_WITH_DOCSTRING: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class NormalForm:
    """What of a file decides what it does."""

    data: bytes
    lines: tuple[int, ...]  # for each line of `data`, which line of the file it is, from 1


class _Token(NamedTuple):
    """One token by offsets into the text."""

    kind: int
    text: str
    begin: int
    end: int
    first: int  # line, from 1
    last: int
    is_nested: bool  # within a formatted string


class _Cut(NamedTuple):
    """Characters that are left out, and what stands there instead."""

    begin: int
    end: int
    instead: str = ""


@lru_cache(maxsize=2048)
def normal_form(data: bytes, *, where: str) -> NormalForm:
    """The normal form of a file.

    Args:    data: Python in UTF-8; where: its name, for errors.
    Raises:  RecipeRefused: not Python; another encoding, a byte order mark, a carriage return alone.
    """
    text = _text(data, where)
    try:
        tree = ast.parse(text, filename=where)
        starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
        tokens = list(_tokens(text, starts))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
        raise RecipeRefused("a file of a recipe is not Python", where=where, found=str(error)) from error
    strings = sorted(_docstrings(tree, text, starts, tokens))
    lines = (_Cut(starts[line - 1], starts[line]) for line in _emptied(text, starts, tokens, strings))
    return _assembled(text, starts, sorted([*strings, *_comments(text, tokens), *lines]))


def _text(data: bytes, where: str) -> str:
    """The text of a file with line feeds alone, as Python itself reads it."""
    for line in data.split(b"\n", 2)[:2]:
        cookie = _COOKIE.match(line)
        if cookie and not _UTF8.fullmatch(cookie[1].decode("ascii", "replace").lower()):
            raise _refusal(where, found=f"coding: {cookie[1].decode('ascii', 'replace')}")
    if data.startswith(_BOM):
        raise _refusal(where, found="a byte order mark")
    data = data.replace(b"\r\n", b"\n")
    if b"\r" in data:
        number = data[: data.index(b"\r")].count(b"\n") + 1
        raise _refusal(f"{where}:{number}", found="a carriage return alone")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(where, found=str(error)) from error


def _refusal(where: str, *, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a file of a recipe is not plain UTF-8",
        where=where,
        expected="UTF-8 without a byte order mark, lines that end in LF or CRLF",
        found=found,
        next_step="save it so; what Python reads otherwise on another machine can be in no key",
    )


def _tokens(text: str, starts: Sequence[int]) -> Iterator[_Token]:
    read, depth = iter(_split(text)), 0
    for token in tokenize.generate_tokens(lambda: next(read, "")):
        name = tokenize.tok_name[token.type]
        begin, end = (starts[line - 1] + column for line, column in (token.start, token.end))
        is_nested = depth > 0
        depth += (name in _BEGIN_FORMATTED) - (name in _END_FORMATTED)
        yield _Token(token.type, token.string, begin, end, token.start[0], token.end[0], is_nested)


def _comments(text: str, tokens: Sequence[_Token]) -> Iterator[_Cut]:
    """Every comment with the blanks before it; what looks like one inside a string is none."""
    for token in tokens:
        if token.kind == tokenize.COMMENT and not token.is_nested:
            begin = token.begin
            while begin > 0 and text[begin - 1] in " \t\f":
                begin -= 1
            yield _Cut(begin, token.end)


def _docstrings(tree: ast.Module, text: str, starts: Sequence[int], tokens: Sequence[_Token]) -> Iterator[_Cut]:
    """All string statements that lead a body; without the first one the second would become the docstring."""
    at = {token.begin: number for number, token in enumerate(tokens) if token.kind not in _SILENT}
    for node in _with_docstring(tree):
        leading = []
        for statement in node.body:
            if not _is_string(statement):
                break
            leading.append(statement)
        is_all = len(leading) == len(node.body) and not isinstance(node, ast.Module)
        for statement in leading:
            begin = _offset(text, starts, statement.lineno, statement.col_offset)
            end = _offset(text, starts, statement.end_lineno or 0, statement.end_col_offset or 0)
            is_last = is_all and statement is leading[-1]
            yield _Cut(begin, _end_of(tokens, at[begin], end), "pass" if is_last else "")


def _with_docstring(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes whose bodies may begin with a docstring: found by way of statements, as no expression holds one."""
    waiting: list[ast.AST] = [tree]
    for node in waiting:
        if isinstance(node, _WITH_DOCSTRING):
            yield node
        for name in _BLOCKS:
            waiting += getattr(node, name, ())


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _offset(text: str, starts: Sequence[int], line: int, column: int) -> int:
    """Where a place of the syntax tree is; its columns count bytes."""
    begin = starts[line - 1]
    return begin + len(text[begin : starts[line]].encode()[:column].decode())


def _end_of(tokens: Sequence[_Token], number: int, end: int) -> int:
    """Where what belongs to a statement ends: before the next one of its line, else before the line's end."""
    while tokens[number].begin < end:
        number += 1
    while tokens[number].kind != tokenize.NEWLINE:
        token = tokens[number]
        if token.kind == tokenize.ENDMARKER or (token.kind not in _MARGIN and token.text != ";"):
            return token.begin
        if token.kind == tokenize.COMMENT:
            return token.begin
        number += 1
    return tokens[number].begin


def _emptied(text: str, starts: Sequence[int], tokens: Sequence[_Token], strings: Sequence[_Cut]) -> set[int]:
    """Lines of which nothing is left, from 1: those of blanks and comments alone, and those of docstrings."""
    gone = [cut for cut in strings if not cut.instead]
    margin, kept, commented, emptied = set[int](), set[int](), set[int](), set[int]()
    lines, is_kept, at = set[int](), False, 0  # of the statement's line that is being read, however long
    for token in tokens:
        if token.kind in _SILENT:
            continue
        if token.kind in _MARGIN and not token.is_nested:
            margin.add(token.first)
            commented |= {token.first} if token.kind == tokenize.COMMENT else set()
            continue
        while at < len(gone) and gone[at].end <= token.begin:
            at += 1
        lines.update(range(token.first, token.last + 1))
        is_end = token.kind == tokenize.NEWLINE
        is_kept |= not is_end and not (at < len(gone) and gone[at].begin <= token.begin)
        if is_end:
            kept |= lines if is_kept else set()
            emptied |= set() if is_kept else set(range(min(lines), max(lines) + 1))
            lines, is_kept = set(), False
    for line in margin - kept:
        above = text[starts[line - 2] : starts[line - 1] - 1] if line > 1 else ""
        if not above.endswith("\\") or line - 1 in commented:  # a line that goes on needs the next one
            emptied.add(line)
    return emptied


def _assembled(text: str, starts: Sequence[int], cuts: Sequence[_Cut]) -> NormalForm:
    """The text without its cuts, and where each line of it came from."""
    kept: list[str] = []
    origins: list[int] = []
    at, is_new = 0, True
    for cut in (*cuts, _Cut(len(text), len(text))):
        piece = text[at : cut.begin]  # empty, if this cut lies within the one before it
        place = at
        for part in _split(piece):
            if is_new:
                origins.append(bisect_right(starts, place))
            is_new = part.endswith("\n")
            place += len(part)
        kept += [piece, cut.instead]
        at = max(at, cut.end)
    return NormalForm("".join(kept).encode(), tuple(origins))


def _split(text: str) -> list[str]:
    """Lines with their line feeds; `splitlines` knows other ends of lines, too."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + [part for part in parts[-1:] if part]
