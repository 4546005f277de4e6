"""Systematic mutants: every place of a module where one small, typical mistake can be made in its syntax tree.

Left alone are what carries no formula: annotations, decorators, messages of errors, strings, the ranges of options.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from copy import copy

from tests.mutants.mutant import Mutant, line_of

Change = tuple[str, ast.expr]  # (kind, what stands there instead)

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
LOGIC = {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
OPPOSITE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
SWAPPED = {"min": "max", "amin": "amax", "minimum": "maximum", "cummin": "cummax", "any": "all"}
SWAPPED |= {new: old for old, new in SWAPPED.items()}
FUNCTIONS = {"exp", "sqrt", "abs", "square"}
SHAPED_LIKE = {"expand_as", "ones_like", "zeros_like"}
PLAIN = {"strict", "frozen", "dtype", "return_inverse"}  # keywords whose value is no part of a formula


def systematic(file: str, source: str) -> list[Mutant]:
    """Every mutant of one module. `file`: its path in the repository."""
    found, seen, trees = [], Counter(), {ast.dump(ast.parse(source))}
    for where, node, kind, instead in _changes(ast.parse(source), ""):
        mutated = _splice(source, node, instead)
        tree = ast.dump(ast.parse(mutated))
        if tree in trees:  # two ways to the same mistake
            continue
        trees.add(tree)
        change = f"{ast.unparse(node)} -> {ast.unparse(instead)}"
        seen[where, change] += 1
        if seen[where, change] > 1:  # the same words again in the same function: told apart by their number
            change += f" #{seen[where, change]}"
        found.append(Mutant(file, node.lineno, where, kind, change, mutated))
    return found


def _changes(node: ast.AST, where: str) -> Iterator[tuple[str, ast.expr, str, ast.expr]]:
    """(name of the function or class, expression, kind, what stands there instead) below a node, in reading order."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or _is_guard(node):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}" if where else node.name
    if isinstance(node, ast.expr):
        yield from ((where, node, kind, instead) for kind, instead in _mutations(node))
    if isinstance(node, ast.If | ast.IfExp):
        yield where, node.test, "condition", _negated(node.test)
    for child in _children(node):
        yield from _changes(child, where)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Attribute) and node.attr in ("shape", "dtype") or _is_capacity(node):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if name == "args" and isinstance(node, ast.Call) and getattr(node.func, "attr", "") in SHAPED_LIKE:
            continue  # read for its shape alone
        if isinstance(node, ast.Call) and name == "keywords":
            ranges = isinstance(node.func, ast.Name) and node.func.id == "option"
            value = [] if ranges else [k for k in value if k.arg not in PLAIN]
        for child in value if isinstance(value, list) else [value]:
            # An axis is changed as a whole, in `_axis`: minus its sign it may be the same one.
            if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg == "dim"):
                yield child


def _is_guard(node: ast.AST) -> bool:
    """`if ...: raise ...`: what is refused is no formula."""
    return isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)


def _is_capacity(node: ast.AST) -> bool:
    """2**17: how much there is room for."""
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and isinstance(node.left, ast.Constant)


def _merges_names(node: ast.expr) -> bool:
    """A union of dictionaries of metrics, or of sets of names, where | is no logic."""
    return isinstance(node, ast.BinOp) and any(word in ast.unparse(node) for word in ("{", "metrics", "logged"))


def _mutations(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            kind = "sign" if isinstance(op, ast.Add | ast.Sub) else "factor"
            yield kind, _with(node, op=ARITHMETIC[type(op)]())
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in LOGIC and not _merges_names(node):
            yield "condition", _with(node, op=LOGIC[type(op)]())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign", operand
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "condition", operand
        case ast.Compare(ops=[op]) if type(op) in OPPOSITE:
            yield "condition", _negated(node)
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                if type(op) in BOUNDARY:
                    yield "boundary", _with(node, ops=[*ops[:i], BOUNDARY[type(op)](), *ops[i + 1 :]])
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(float(f"{1.5 * value:.12g}") if value else 1.0)
        case ast.Attribute(attr="mask", ctx=ast.Load()):
            yield "mask", ast.BinOp(node, ast.BitOr(), ast.Constant(True))
        case ast.Name(id="mask", ctx=ast.Load()):
            yield "mask", ast.BinOp(node, ast.BitOr(), ast.Constant(True))
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[Change]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    on_torch = isinstance(owner, ast.Name) and owner.id in ("torch", "math")
    value = node.args[0] if on_torch and node.args else owner  # what the function is applied to
    if name == "reduce" and owner is None:
        yield "denominator", node.args[0]
    elif name == "detach" and owner is not None:
        yield "detach", owner
    elif name == "clamp" and value is not None:
        yield "bound", value
        if len(node.keywords) == 1 and not node.args:
            keyword = node.keywords[0]
            yield "min-max", _with(node, keywords=[ast.keyword(SWAPPED[str(keyword.arg)], keyword.value)])
    elif name == "where" and on_torch and not ast.unparse(node.args[0]).endswith("mask"):
        yield "condition", _with(node, args=[node.args[0], node.args[2], node.args[1]])
    elif name in SWAPPED:
        yield "min-max", _with(node, func=_renamed(node.func, SWAPPED[name]))
    elif name in FUNCTIONS and value is not None:
        yield "function", value
    for i, keyword in enumerate(node.keywords):
        if keyword.arg == "dim" and ast.unparse(keyword.value) != "0":
            other = ast.keyword("dim", ast.Constant(0))
            yield "axis", _with(node, keywords=[*node.keywords[:i], other, *node.keywords[i + 1 :]])


def _negated(test: ast.expr) -> ast.expr:
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Compare(ops=[op]) if type(op) in OPPOSITE:
            return _with(test, ops=[OPPOSITE[type(op)]()])
    return ast.UnaryOp(ast.Not(), test)


def _renamed(function: ast.expr, name: str) -> ast.expr:
    return _with(function, attr=name) if isinstance(function, ast.Attribute) else _with(function, id=name)


def _with(node: ast.expr, **fields: object) -> ast.expr:
    """A copy of the node with other fields."""
    changed = copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _splice(source: str, node: ast.expr, instead: ast.expr) -> str:
    """The source with one expression replaced, in brackets: what binds tighter around it stays as it was."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    begin = line_of(source, node.lineno) + node.col_offset
    end = line_of(source, node.end_lineno) + node.end_col_offset
    raw = source.encode()  # the columns of a syntax tree count bytes
    return (raw[:begin] + f"({ast.unparse(instead)})".encode() + raw[end:]).decode()
