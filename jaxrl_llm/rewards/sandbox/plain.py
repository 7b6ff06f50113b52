"""Which code is so plain that it cannot change what other code in the same interpreter sees.

A check's process is the wall between checks. Checks that are plain need no wall between them, and may share one process: that is most of
what published rules consist of, and a process costs many times what such a rule does. The list is of what is allowed; whatever is
not on it has a process of its own. Plain code

- is functions, constants and imports of the modules below, with statements and expressions that only make and read values;
- names no builtin but those below: none that runs code, opens files, prints, or reaches another's names or attributes;
- reads no attribute but those below, methods of texts, numbers, collections and regular expressions that give back new values or change their
  own, and sets none. So it reaches no frame, no function's globals, no class and no module's insides, through which it could change
  what is shared: the interpreter's builtins, the modules, and their tables.
"""

from __future__ import annotations

import ast
import builtins

VALUES = """
    abs all any ascii bin bool bytes chr complex dict divmod enumerate filter float frozenset hash hex int isinstance issubclass iter len list map max
    min next oct ord pow range repr reversed round set slice sorted str sum tuple zip
"""
ERRORS = """
    Exception ValueError TypeError KeyError IndexError AttributeError ZeroDivisionError ArithmeticError LookupError UnicodeError RecursionError
    OverflowError StopIteration AssertionError NotImplementedError RuntimeError
"""
PARTS = {
    "re": """search match fullmatch findall finditer sub subn split compile escape error Pattern Match A ASCII I IGNORECASE M MULTILINE S DOTALL U
        UNICODE X VERBOSE""",
    "json": "loads dumps JSONDecodeError",
    "math": "ceil floor sqrt log log2 log10 exp pow isclose isnan isinf isfinite gcd fabs pi e inf nan",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits punctuation whitespace printable",
    "collections": "Counter OrderedDict defaultdict deque",
    "itertools": "chain groupby islice accumulate combinations product permutations takewhile dropwhile zip_longest",
    "ast": "literal_eval",
    "unicodedata": "category name normalize east_asian_width",
    "typing": "Any Dict List Optional Set Tuple Union",
}
OF_TEXTS = """
    capitalize casefold center count decode encode endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition
    rsplit rstrip split splitlines startswith strip swapcase title translate upper zfill maketrans
"""  # without format, which reads any attribute
OF_COLLECTIONS = """
    is_integer bit_length append clear copy extend insert pop remove reverse sort add difference discard intersection isdisjoint issubset issuperset
    symmetric_difference union update fromkeys get items keys popitem setdefault values most_common elements appendleft popleft from_iterable
"""
OF_PATTERNS = "group groups groupdict start end span expand pattern string flags lastindex lastgroup pos endpos args msg"  # and of errors
MODULES = frozenset(PARTS)
PARTS_OF = {module: frozenset(names.split()) for module, names in PARTS.items()}
BUILTINS = frozenset((VALUES + ERRORS).split())
ATTRIBUTES = frozenset((OF_TEXTS + OF_COLLECTIONS + OF_PATTERNS).split()).union(*PARTS_OF.values())
FOREIGN = frozenset(dir(builtins)) - BUILTINS  # a name of the code's own may be read where it is not bound yet: then the builtin is meant
NODES = (
    ast.Module, ast.FunctionDef, ast.Lambda, ast.arguments, ast.arg, ast.keyword, ast.Return, ast.Import, ast.ImportFrom, ast.alias,
    ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.Delete, ast.For, ast.While, ast.If, ast.Break, ast.Continue, ast.Pass, ast.Try,
    ast.ExceptHandler, ast.Raise, ast.Assert, ast.Expr, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Dict, ast.Set, ast.List, ast.Tuple,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Yield, ast.Compare, ast.Call, ast.FormattedValue,
    ast.JoinedStr, ast.Constant, ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.Slice, ast.expr_context, ast.boolop, ast.operator,
    ast.unaryop, ast.cmpop, ast.Nonlocal, ast.Global,
)  # fmt: skip


def is_plain(source: str) -> bool:
    """Whether `source` is plain. Code that is no Python is not."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    nodes = list(ast.walk(tree))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name}
    own |= {alias.asname or alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    if own & FOREIGN or any(name.startswith("__") for name in own):  # such as __builtins__
        return False
    known = own | BUILTINS
    return all(_allowed(node, known) for node in nodes)


def _allowed(node: ast.AST, known: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in known
    if isinstance(node, ast.Attribute):
        return isinstance(node.ctx, ast.Load) and node.attr in ATTRIBUTES
    if isinstance(node, ast.Import):
        return all(alias.name in MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return not node.level and node.module in MODULES and all(alias.name in PARTS_OF[node.module] for alias in node.names)
    if isinstance(node, ast.FunctionDef):
        return not node.decorator_list
    return isinstance(node, NODES)
