"""PTX text, as far as LLVM and Triton write it: parameters, registers, instructions with their labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Instruction:
    op: str  # with all its suffixes: "ld.global.v4.b32"
    operands: tuple[str, ...]  # a vector is one: "{%r1,%r2}"
    guard: str = ""  # predicate register; empty: always
    negated: bool = False
    line: int = 0


@dataclass
class Program:
    name: str = ""
    target: int = 0  # 75: sm_75
    parameters: dict[str, int] = field(default_factory=dict)  # name -> bytes
    registers: dict[str, int] = field(default_factory=dict)  # name -> bits
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction that follows


def parse(text: str) -> Program:
    """Of a module that holds one kernel and no function beside it."""
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.visible \.entry (\w+)\(([^)]*)\)[^{]*\{", text)
    if head is None:
        raise ValueError("no kernel in this PTX")
    target = re.search(r"\.target sm_(\d+)", text)
    program = Program(name=head[1], target=int(target[1]) if target else 0)
    for parameter in filter(None, (part.strip() for part in head[2].split(","))):
        program.parameters.update(_parameter(parameter))
    scopes: list[dict[str, str]] = [{}]
    for statement, line in _statements(text, head.end()):
        if not _scope(statement, scopes):
            break
        _statement(_opened(statement, scopes, program, line), scopes, program, line)
    return program


def _parameter(text: str) -> Iterator[tuple[str, int]]:
    if array := re.match(r".*\.b8 (\w+)\[(\d+)\]$", text):
        yield array[1], int(array[2])
    else:
        kind, name = re.match(r"\.param \.[usbf](\d+).*?(\w+)$", text).groups()  # type: ignore[union-attr]
        yield name, int(kind) // 8


def _statements(text: str, start: int) -> Iterator[tuple[str, int]]:
    """What stands between semicolons, directives of lines left out; a closing brace is one of its own."""
    line = text.count("\n", 0, start) + 1
    kept = []
    for i, row in enumerate(text[start:].split("\n")):
        words = row.strip()
        if not words.startswith((".loc", ".file", ".pragma")):
            kept.append((words, line + i))
    at, so_far = 0, ""
    for words, at in kept:
        for piece in re.split(r"(;)", words):
            if piece == ";":
                yield so_far.strip(), at
                so_far = ""
            elif (so_far + piece).strip() == "}":
                yield "}", at
                so_far = ""
            else:
                so_far += piece + " "
    yield "}", at


def _scope(statement: str, scopes: list[dict[str, str]]) -> bool:
    """Closes a scope; whether the kernel goes on."""
    if statement == "}":
        scopes.pop()
    return bool(scopes)


def _opened(statement: str, scopes: list[dict[str, str]], program: Program, line: int) -> str:
    """The statement behind the braces and labels that it begins with."""
    while True:
        if statement.startswith("{"):
            scopes.append({"": f"@{line}"})
            statement = statement[1:].strip()
        elif label := re.match(r"([\w$]+):(?!:)\s*", statement):
            program.labels[_local(label[1], scopes)] = len(program.code)
            statement = statement[label.end() :]
        elif statement.startswith("}") and len(scopes) > 1:  # behind a label
            scopes.pop()
            statement = statement[1:].strip()
        else:
            return statement


def _local(label: str, scopes: list[dict[str, str]]) -> str:
    return label if label.startswith("$") else label + scopes[-1].get("", "")


def _statement(statement: str, scopes: list[dict[str, str]], program: Program, line: int) -> None:
    if not statement or statement == "}":
        return
    if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
        for name in (part.strip() for part in declared[2].split(",")):
            _declare(name, WIDTHS[declared[1]], scopes, program)
        return
    if statement.startswith("."):
        return
    found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise ValueError(f"line {line}: not understood: {statement[:120]}")
    negated, guard, op, rest = found.groups()
    names = {name: new for scope in scopes for name, new in scope.items() if name}
    operands = tuple(_renamed(part, names) for part in _operands(rest))
    if op.startswith("bra"):
        operands = (_local(operands[0], scopes),)
    program.code.append(Instruction(op, operands, names.get(guard or "", guard or ""), bool(negated), line))


def _declare(name: str, bits: int, scopes: list[dict[str, str]], program: Program) -> None:
    if many := re.match(r"(%\w+)<(\d+)>", name):
        program.registers.update({f"{many[1]}{i}": bits for i in range(int(many[2]))})
    else:
        new = name + scopes[-1].get("", "")
        scopes[-1][name] = new
        program.registers[new] = bits


def _operands(text: str) -> Iterator[str]:
    depth, so_far = 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            yield re.sub(r"\s+", "", so_far)
            so_far = ""
        else:
            so_far += letter
    if so_far.strip():
        yield re.sub(r"\s+", "", so_far)


def _renamed(operand: str, names: dict[str, str]) -> str:
    return names.get(operand, operand) if re.fullmatch(r"[%\w]+", operand) else operand
