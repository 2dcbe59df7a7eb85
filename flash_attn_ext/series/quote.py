"""Quotes the sources by name, so that what a notebook shows is what is compiled.

    quote.function("cpu/forward.inl", "online_softmax")
    quote.loop("cuda/kernels/forward_sm80.cu", around="multiply_values")

A name that is not there any more raises LookupError, which fails the notebook in CI: a quotation
can vanish, but not go stale. Understands as much of C as the project's own formatting
(clang-format) needs: comments and strings are no code, and brackets match.
"""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def function(path: str | Path, name: str) -> str:
    """The definition of a function of csrc, together with the comment above it.

    `name` is as written in the file, or x where that is T(x), the C kernels' way to name one
    function for each dtype.
    """
    source = _read(path)
    code = _blank_out(source)
    for found in re.finditer(rf"{_spelled(name)}\s*\(", code):
        if _depth(code, found.start()) > 0:
            continue  # a call
        end_of_parameters = _closing(code, found.end() - 1)
        body = re.compile(r"\s*\{").match(code, end_of_parameters)
        if body:
            end = _closing(code, body.end() - 1)
            return source[_start_of_definition(source, code, found.start()) : end]
    raise LookupError(_missing(f"no function {name}", path))


def loop(path: str | Path, around: str) -> str:
    """The innermost loop with a call of `around` in its body; of several the shortest."""
    source = _read(path)
    code = _blank_out(source)
    calls = [call.start() for call in re.finditer(rf"{_spelled(around)}\s*\(", code)]
    loops = []
    for found in re.finditer(r"\b(?:for|while)\s*\(", code):
        head_end = _closing(code, found.end() - 1)
        body = re.compile(r"\s*\{").match(code, head_end)
        end = _closing(code, body.end() - 1) if body else code.index(";", head_end) + 1
        if any(head_end <= call < end for call in calls):
            loops.append((end - found.start(), found.start(), end))
    if not loops:
        raise LookupError(_missing(f"no loop around a call of {around}", path))
    _, start, end = min(loops)
    indent = start - source.rfind("\n", 0, start) - 1
    # Not textwrap.dedent: clang-format puts #pragma into the first column.
    return re.sub(rf"^ {{1,{indent}}}", "", source[start:end], flags=re.MULTILINE)


def exists(path: str | Path) -> bool:
    """Whether csrc has this file: for what only some versions of the project have."""
    return (CSRC / path).is_file()


def show(code: str, language: str = "c"):
    """For the last line of a notebook's cell: the code with its colours."""
    from IPython.display import Markdown

    return Markdown(f"```{language}\n{code}\n```")


def _read(path: str | Path) -> str:
    if not CSRC.is_dir():
        raise FileNotFoundError(f"The sources are not at {CSRC}: quoting needs a checkout.")
    if not (CSRC / path).is_file():
        raise LookupError(f"There is no file csrc/{path} any more: update what quotes it.")
    return (CSRC / path).read_text()


def _spelled(name: str) -> str:
    return rf"(?:\b{re.escape(name)}|\bT\({re.escape(name)}\))"


def _missing(what: str, path: str | Path) -> str:
    return f"There is {what} in csrc/{path} (any more): update what quotes it."


def _blank_out(source: str) -> str:
    """The same length, with spaces for comments, strings, characters and preprocessor lines."""
    other = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(
        other,
        lambda found: re.sub(r"[^\n]", " ", found[0]),
        source,
        flags=re.DOTALL | re.MULTILINE,
    )


def _depth(code: str, position: int) -> int:
    return sum({"{": 1, "}": -1}.get(letter, 0) for letter in code[:position])


def _closing(code: str, opening: int) -> int:
    """The position behind the bracket that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(code)):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(code[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError("unbalanced brackets")


def _start_of_definition(source: str, code: str, name: int) -> int:
    """Behind whatever came before the definition that has its name here, but with its comment."""
    before = max(code.rfind("}", 0, name), code.rfind(";", 0, name)) + 1
    lines = source[before:name].split("\n")
    # A blank line, or one of the preprocessor, ends what belongs to the definition.
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index].strip()
        if index < len(lines) - 1 and (not line or (line[0] == "#" and "pragma" not in line)):
            return before + len("\n".join(lines[: index + 1])) + 1
    return before + len(source[before:name]) - len(source[before:name].lstrip())
