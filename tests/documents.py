"""Find the code blocks of Markdown pages, and run or check them.

The language of a block decides: ``python`` and ``bash`` are run; ``output`` is compared with what the block before it
prints, where ``...`` matches anything; ``text`` is ignored. A block whose first line is a comment that begins with
`NOT_RUN` and a reason is only checked: Python is compiled, commands are parsed by their argument parser.
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
        line: number of the first line of code, from 1.
        language: the word after the fence.
        code: the lines between the fences.
        run_by_ci: whether `.ci/run` runs this block.
    """

    page: Path
    line: int
    language: str
    code: str
    run_by_ci: bool = False

    @property
    def reason(self) -> str | None:
        """The block's reason for not being run, or None."""
        first = self.code.partition("\n")[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def code_blocks(page: Path) -> list[CodeBlock]:
    """Return every fenced block of a page, in order.

    Raises:
        ValueError: a block has no language or an unknown one, or does not end.
    """
    blocks: list[CodeBlock] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        opening = _FENCE.match(lines[index])
        index += 1
        if opening is None:
            continue
        indent, fence, language = opening["indent"], opening["fence"], opening["info"].strip()
        start = index
        while index < len(lines) and lines[index].strip() != fence:
            index += 1
        if index == len(lines):
            raise ValueError(f"{page.name}:{start}: the block does not end")
        code = "\n".join(line.removeprefix(indent) for line in lines[start:index]) + "\n"
        before = lines[start - 2] if start > 1 else ""
        index += 1
        if language not in {"python", "bash", *_DATA}:
            raise ValueError(f"{page.name}:{start}: a block must be python, bash, output or text, got {language!r}")
        blocks.append(CodeBlock(page, start + 1, language, code, before.startswith("<!-- ci:")))
    return blocks


def run(blocks: list[CodeBlock], shared: bool = True) -> None:
    """Run the blocks of a page in the current folder.

    Args:
        blocks: the blocks, in the order of the page.
        shared: whether Python blocks share their variables.
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
    """Check a block without running it."""
    if block.language == "python":
        _compiled(block)
        return
    for command in commands(block):
        check_command(block, command)


def _namespace() -> dict[str, Any]:
    return {"__name__": "__documentation__"}


def _compiled(block: CodeBlock) -> Any:
    """Compile a block with the line numbers of its page, for tracebacks."""
    return compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


# --- commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command of a shell block: environment variables, program, arguments."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def commands(block: CodeBlock) -> Iterator[Command]:
    """Yield the commands of a shell block: one per line, or several joined by ``&&``. No other shell syntax is allowed."""
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
    """Run a command of the project in this process, to save the import of torch."""
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
            raise AssertionError(f"{block}: the tests know no command {command.program!r}; give a reason not to run it")
    assert not code, f"{block}: {command} ended with {code}"


def check_command(block: CodeBlock, command: Command) -> None:
    """Check that a command's options and files exist."""
    program, arguments = command.program, list(command.arguments)
    if program == "torchrun":
        assert arguments[-1].endswith(".py") or "-m" in arguments, f"{block}: torchrun of what?"
        if "-m" not in arguments:
            return  # a script that the reader writes
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "python" and arguments[:2] == ["-m", "orepa"]:
        program, arguments = "orepa", arguments[2:]
    if program == "orepa":
        try:
            cli._parser(arguments).parse_args(arguments)
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
