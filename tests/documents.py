"""The code blocks of Markdown pages: found, run as they stand there, or, where they say why not, checked without running.

A page marks its blocks by their language: ``python``, ``bash``, and ``output`` for what the block before it prints, where
``...`` stands for anything. Everything else (``text``) is no code. A block whose first line is a comment that begins with
`NOT_RUN` is compiled, or parsed by the command's own parser, and not run; the reason stands there for the reader.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from orepa import cli
from orepa_kernels import info

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "# Not run by the tests: "

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|:::+) *(?P<info>[^\n`]*)$")
_DATA = {"output", "text", "{toctree}", "{eval-rst}"}
_MATCH = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    Args:
        page: the file.
        line: number of its first line of code, from 1.
        language: what stands behind the fence.
        code: without the fences.
        run_by_ci: `.ci/run` takes this block's commands from the README.
    """

    page: Path
    line: int
    language: str
    code: str
    run_by_ci: bool = False

    @property
    def reason(self) -> str | None:
        """Why it is not run, in its own words, or None."""
        first = self.code.partition("\n")[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def code_blocks(page: Path) -> list[CodeBlock]:
    """Every fenced block of a page, in order.

    Raises:
        ValueError: a block without a language, of an unknown one, or one that does not end.
    """
    found: list[CodeBlock] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        indent, fence, language = opening["indent"], opening["fence"], opening["info"].strip()
        start = number
        while number < len(lines) and lines[number].strip() != fence:
            number += 1
        if number == len(lines):
            raise ValueError(f"{page.name}:{start}: the block does not end")
        code = "\n".join(line.removeprefix(indent) for line in lines[start:number]) + "\n"
        before = lines[start - 2] if start > 1 else ""
        number += 1
        if language not in {"python", "bash", *_DATA}:
            raise ValueError(f"{page.name}:{start}: a block must be python, bash, output or text, got {language!r}")
        found.append(CodeBlock(page, start + 1, language, code, before.startswith("<!-- ci:")))
    return found


def run(blocks: list[CodeBlock], shared: bool = True) -> None:
    """Run the blocks of a page in the current folder.

    Args:
        blocks: in the order of the page.
        shared: whether a Python block sees the names of those before it.
    """
    names: dict[str, Any] = _namespace()
    printed = ""
    for block in blocks:
        if block.language == "output":
            checker = doctest.OutputChecker()
            assert checker.check_output(block.code, printed, _MATCH), f"{block}: what was printed:\n{printed}"
        elif block.language in ("python", "bash"):
            printed = ""
            if block.reason is not None or block.run_by_ci:
                check(block)
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                if block.language == "python":
                    names = names if shared else _namespace()
                    exec(_compiled(block), names)
                else:
                    for command in commands(block):
                        run_command(block, command)
            printed = out.getvalue()


def check(block: CodeBlock) -> None:
    """What can be checked of a block without running it."""
    if block.language == "python":
        _compiled(block)
        return
    for command in commands(block):
        check_command(block, command)


def _namespace() -> dict[str, Any]:
    return {"__name__": "__documentation__"}


def _compiled(block: CodeBlock) -> Any:
    """With the line numbers of the page, for tracebacks."""
    return compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


# --- commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One line of a shell block: environment variables, program, arguments."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def commands(block: CodeBlock) -> Iterator[Command]:
    """The commands of a shell block: one per line, or several with ``&&`` between them, and no other shell syntax."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            variables = {}
            while words and re.match(r"^[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                yield Command(variables, words[0], words[1:])


def run_command(block: CodeBlock, command: Command) -> None:
    """Run a command of the project in this process, which spares the seconds that importing torch takes."""
    arguments = command.arguments
    with mock.patch.dict(os.environ, command.variables):
        if command.program == "orepa":
            code = cli.main(arguments)
        elif command.program == "python" and arguments[:2] == ["-m", "orepa_kernels.info"]:
            code = info.main(arguments[2:])
        elif command.program == "python" and arguments[0].startswith("examples/"):
            with mock.patch.object(sys, "argv", arguments):
                code = 0 if runpy.run_path(str(ROOT / arguments[0]), run_name="__main__") else 1
        else:
            raise AssertionError(f"{block}: the tests know no command {command.program!r}; say why it is not run")
    assert not code, f"{block}: {command} ended with {code}"


def check_command(block: CodeBlock, command: Command) -> None:
    """Check that a command's options and files exist."""
    program, arguments = command.program, list(command.arguments)
    if program == "torchrun":
        assert arguments[-1].endswith(".py") or "-m" in arguments, f"{block}: torchrun of what?"
        if "-m" not in arguments:
            return  # a script of the reader's
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "python" and arguments[:2] == ["-m", "orepa"]:
        program, arguments = "orepa", arguments[2:]
    if program == "orepa":
        try:
            cli._parser().parse_args(arguments)
        except SystemExit as end:
            raise AssertionError(f"{block}: orepa {shlex.join(arguments)}: no such options") from end
    elif program == "python" and arguments[:3] == ["-m", "pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        known = re.findall(r"^(\w+) = ", section, flags=re.MULTILINE)
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(known), f"{block}: no such extras: {extras}"
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).exists(), f"{block}: there is no {arguments[0]}"
    else:
        assert [program, *arguments[:2]] in (["python", "-m", "pytest"], ["git", "clone", "URL"]) or program in (
            "sphinx-build",
            "bash",
        ), f"{block}: the tests know no command {program!r}"
