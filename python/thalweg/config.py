"""Configuration files: TOML in, checked and resolved, TOML out.

    [problem]     symbols, cell, pbc, box, template, c1, c2
    [calculator]  name = "emt" | "lj" | "tersoff" | ... | an ASE calculator | "module:factory", and its arguments;
                  workers, timeout, retries, scratch run it in processes of its own
    [search]      method, iterations, restarts, seed, max_evaluations, target, workers,
                  stop_when_agree, and the method's own options

Every mistake gives one line with the file, the key, what was expected and what came; unknown keys name the nearest
valid one. Lengths are in angstrom, energies in eV.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError

from thalweg.errors import ConfigurationError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

if TYPE_CHECKING:
    from thalweg.records import Problem
    from thalweg.search import Search

__all__ = [
    "CalculatorSection",
    "Configuration",
    "ProblemSection",
    "SearchSection",
    "TargetSection",
    "described",
    "make_calculator",
    "recipe_options",
    "typed_options",
]

# Iterations when the file gives none: what each method needs to be useful on a cluster of ten atoms.
DEFAULT_ITERATIONS = {"gofee": 100, "basin_hopping": 500, "complementary_energy": 500, "random_search": 200}
FALLBACK_ITERATIONS = 100

# Arguments of a recipe that are not options of the user's: the [search] keys of the same name or the program set them.
RESERVED = ("problem", "calculator", "store", "seed", "callbacks")
# Options that name a file, relative ones beside the TOML file; a run folder gets a copy.
FILES = ("transfer_from",)


# No configuration is larger [bytes]; nobody runs more restarts or iterations.
LARGEST_FILE = 10_000_000
MOST_RESTARTS, MOST_ITERATIONS = 100_000, 1_000_000_000
# Of a method's options: whole numbers count something that takes memory or time, others are energies or lengths.
MOST_OF_ANYTHING, LARGEST_NUMBER = 1_000_000, 1e12


# ---- checks of single values ---------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _is_vector(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_vector, value))


def _symbols(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value.values())
    ):
        return value
    raise ValueError('expected a formula such as "Au4Ni4" or a table of counts such as {Au = 4, Ni = 4}')


def _cell(value: Any) -> Any:
    if value is None or _is_number(value) or _is_vector(value) or _is_matrix(value):
        return value
    raise ValueError("expected an edge length, three lengths or three lattice vectors (angstrom)")


def _pbc(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(one, bool) for one in value):
        return value
    raise ValueError("expected true, false or three of them")


def _box(value: Any) -> Any:
    if value is None or _is_number(value):
        return value
    if isinstance(value, dict) and set(value) == {"corner", "vectors"} and _is_vector(value["corner"]):
        vectors = value["vectors"]
        if _is_number(vectors) or _is_vector(vectors) or _is_matrix(vectors):
            return value
    raise ValueError(
        "expected an edge length, or {corner = [x, y, z], vectors = [[...], [...], [...]]} (angstrom; vectors may also "
        "be three lengths)"
    )


# ---- sections ------------------------------------------------------------------------------------------------

_STRICT = ConfigDict(extra="forbid", strict=True, validate_default=False, allow_inf_nan=False)


class ProblemSection(BaseModel):
    """Which atoms to place, where, next to what."""

    model_config = _STRICT
    symbols: Annotated[Any, BeforeValidator(_symbols)]
    cell: Annotated[Any, BeforeValidator(_cell)] = None
    pbc: Annotated[Any, BeforeValidator(_pbc)] = None
    box: Annotated[Any, BeforeValidator(_box)] = None
    template: str | None = None
    c1: float = Field(0.75, gt=0)
    c2: float = Field(1.25, gt=0)


class CalculatorSection(BaseModel):
    """The true potential: its name, and as further keys its arguments; the four keys after the name put it into worker
    processes of its own (`thalweg.pool.Guarded`)."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    workers: int | None = Field(None, ge=1)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    retries: int | None = Field(None, ge=0)
    scratch: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def guard(self) -> dict[str, Any]:
        """The settings of Guarded that are given."""
        names = ("workers", "timeout", "retries", "scratch")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class TargetSection(BaseModel):
    """The energy [eV] that counts as success, and whether a restart ends when it has been delivered."""

    model_config = _STRICT
    energy: float
    tolerance: float = Field(0.001, ge=0)
    stop: bool = False

    @property
    def threshold(self) -> float:
        return self.energy + self.tolerance


class SearchSection(BaseModel):
    """How to search; further keys are the method's own options, kept in `options`."""

    model_config = _STRICT
    method: str = "gofee"
    iterations: int = Field(FALLBACK_ITERATIONS, ge=1, le=MOST_ITERATIONS)
    restarts: int = Field(1, ge=1, le=MOST_RESTARTS)
    seed: int = Field(0, ge=0, lt=2**63)
    max_evaluations: int | None = Field(None, ge=1)
    target: TargetSection | None = None
    workers: int | None = Field(None, ge=1)
    stop_when_agree: int | None = Field(None, ge=2)


SECTIONS: dict[str, type[BaseModel]] = {
    "problem": ProblemSection,
    "calculator": CalculatorSection,
    "search": SearchSection,
}


# ---- the whole -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A checked configuration. `folder` is where relative paths start; `options` are the method's own, complete."""

    problem: ProblemSection
    calculator: CalculatorSection
    search: SearchSection
    options: Mapping[str, Any]
    folder: Path

    @classmethod
    def load(cls, path: str | Path, *, overrides: Sequence[str] = ()) -> Configuration:
        """Reads a TOML file; `overrides` are `key=value` strings with dotted keys and values in TOML syntax.

        Raises ConfigurationError with one line per mistake.
        """
        path = Path(path)
        try:
            with open(path, "rb") as file:
                raw = file.read(LARGEST_FILE + 1)
            if len(raw) > LARGEST_FILE:
                raise ConfigurationError(f"'{path}' is larger than {LARGEST_FILE} bytes; it is no configuration")
            data = tomllib.loads(raw.decode())
        except FileNotFoundError:
            others = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
            raise ConfigurationError(f"there is no file '{path}'.{nearest(path.name, others)}") from None
        except IsADirectoryError:
            raise ConfigurationError(
                f"'{path}' is a folder, not a TOML file; to continue a run folder use `thalweg resume {path}`"
            ) from None
        except OSError as problem:
            raise ConfigurationError(f"cannot read '{path}': {problem.strerror}") from None
        except ConfigurationError:
            raise
        except RecursionError:
            raise ConfigurationError(f"{path}: not valid TOML: it is nested too deeply") from None
        except ValueError as problem:  # syntax, encoding, numbers of thousands of digits
            raise ConfigurationError(f"{path}: not valid TOML: {_first_line(problem)}") from None
        for override in overrides:
            data = _merged(data, parse_override(override))
        return cls.from_dict(data, folder=path.parent, source=str(path))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, folder: str | Path = ".", source: str = "configuration"
    ) -> Configuration:
        """The same from nested dictionaries."""
        mistakes: list[str] = []
        for name in data:
            if name == "campaign":
                mistakes.append(
                    "[campaign] (crossing lists of settings) is not in this version; write one file per setting, or "
                    "loop over `thalweg run FILE --set key=value --out DIR`"
                )
            elif name not in SECTIONS:
                mistakes.append(f"unknown section [{name}]; sections are {_listed(SECTIONS)}.{nearest(name, SECTIONS)}")
            elif not isinstance(data[name], dict):
                mistakes.append(f"{name}: expected a section [{name}], got {_shown(data[name])}")
        for name in ("problem", "calculator"):
            if name not in data:
                mistakes.append(f"section [{name}] is missing")
        _raise_if(mistakes, source)

        parts: dict[str, Any] = {}
        for name in ("problem", "calculator"):
            parts[name] = _checked(SECTIONS[name], data[name], name, mistakes)
        section = dict(data.get("search", {}))
        own = {key: section.pop(key) for key in list(section) if key not in SearchSection.model_fields}
        method = section.get("method", "gofee")
        options: dict[str, Any] = {}
        if isinstance(method, str):
            try:
                options = recipe_options(method, own)
            except ConfigurationError as problem:
                mistakes.extend(str(problem).splitlines())
            section.setdefault("iterations", DEFAULT_ITERATIONS.get(method, FALLBACK_ITERATIONS))
        parts["search"] = _checked(SearchSection, section, "search", mistakes)
        _raise_if(mistakes, source)
        agree, restarts = parts["search"].stop_when_agree, parts["search"].restarts
        if agree is not None and agree > restarts:
            mistakes.append(f"search.stop_when_agree: {agree} restarts cannot agree, search.restarts is {restarts}")
            _raise_if(mistakes, source)

        if parts["problem"].template is not None:
            given = [key for key in ("cell", "pbc") if getattr(parts["problem"], key) is not None]
            if given:
                mistakes.append(f"problem.{given[0]}: the template brings its own cell and pbc; remove this key")
        _raise_if(mistakes, source)
        return cls(**parts, options=options, folder=Path(folder))

    def to_dict(self) -> dict[str, Any]:
        """Everything, resolved, as plain TOML values; keys that are not set are left out."""
        search = self.search.model_dump(exclude_none=True)
        target = search.pop("target", None)
        search |= {key: value for key, value in self.options.items() if value is not None}
        if target is not None:
            search["target"] = target
        return {
            "problem": self.problem.model_dump(exclude_none=True),
            "calculator": self.calculator.model_dump(exclude_none=True),
            "search": search,
        }

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `load` of it gives an equal configuration."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    def with_search(self, **changes: Any) -> Configuration:
        """A copy with keys of [search] replaced (None: left alone); checked again."""
        data = self.to_dict()
        data["search"] |= {key: value for key, value in changes.items() if value is not None}
        return Configuration.from_dict(data, folder=self.folder, source="command line")

    # ---- what it builds ------------------------------------------------------------------------------
    def template_path(self) -> Path | None:
        """The template's file, or None."""
        return None if self.problem.template is None else self.folder / self.problem.template

    def files(self) -> dict[str, Path]:
        """The files that options name, by option."""
        named = {name: self.options.get(name) for name in FILES}
        return {name: self.folder / Path(value).expanduser() for name, value in named.items() if value is not None}

    def make_problem(self) -> Problem:
        """The Problem; reads the template. Raises ConfigurationError."""
        from thalweg.records import Problem

        options: dict[str, Any] = {"c1": self.problem.c1, "c2": self.problem.c2}
        box = self.problem.box
        if box is not None:
            options["box"] = (box["corner"], box["vectors"]) if isinstance(box, dict) else box
        path = self.template_path()
        if path is not None:
            return Problem.from_atoms(_read_template(path), self.problem.symbols, **options)
        options |= {
            key: getattr(self.problem, key) for key in ("cell", "pbc") if getattr(self.problem, key) is not None
        }
        return Problem(self.problem.symbols, **options)

    def make_calculator(self) -> Any:
        """The calculator. Raises ConfigurationError."""
        guard = self.calculator.guard
        if not guard:
            return make_calculator(self.calculator.name, **self.calculator.arguments)
        from thalweg.pool import Guarded

        if "scratch" in guard:
            guard["scratch"] = _scratch(guard["scratch"])
        _find_factories_here(self.calculator.name)
        return Guarded(self.calculator.name, self.calculator.arguments, **guard)

    def make_search(self, *, seed: int, store: str | Path | None) -> Search:
        """A search with this seed on this store; it continues where the store ends. None: in memory."""
        from thalweg.recipes import RECIPES

        recipe = RECIPES[self.search.method]
        options = typed_options(self.search.method, self.options) | {k: str(path) for k, path in self.files().items()}
        if isinstance(prior := options.get("prior"), dict):
            _find_factories_here(str(prior.get("calculator")))
        return recipe(self.make_problem(), self.make_calculator(), store=store, seed=seed, **options)


def parse_override(text: str) -> dict[str, Any]:
    """`{"search": {"seed": 3}}` from "search.seed=3"; a bare word is a string. Raises ConfigurationError."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key or not value:
        raise ConfigurationError(f"--set expects section.key=value, for example search.seed=3, got '{text}'")
    if "." not in key:
        raise ConfigurationError(f"--set {text}: name the section too, for example search.{key}={value}")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if not set(value) & set("\"'[]{}#"):
                return tomllib.loads(f"{key} = {json.dumps(value)}")
    raise ConfigurationError(
        f"--set {text}: '{value}' is not a TOML value; write numbers, true, false, \"text\", [lists] or {{tables}}"
    )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merged(out[key], value) if both else value
    return out


# ---- recipes' options ----------------------------------------------------------------------------------------


def recipe_options(method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The complete options of a recipe: `given` checked against its signature, defaults for the rest.

    Raises ConfigurationError for an unknown method or option or a value of the wrong type, one line each.
    """
    from thalweg.recipes import RECIPES

    if method not in RECIPES:
        raise ConfigurationError(
            f"search.method: there is no method '{method}'; methods are {_listed(RECIPES)}.{nearest(method, RECIPES)}"
        )
    recipe = RECIPES[method]
    hints = _annotations(recipe)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(recipe).parameters.items()
        if name not in RESERVED and parameter.kind is parameter.KEYWORD_ONLY
    }
    mistakes = []
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty and _fits_toml(parameter.default):
            values[name] = _plain(parameter.default)
    for name, value in (given or {}).items():
        if name not in parameters:
            valid = [*SearchSection.model_fields, *parameters]
            guess = nearest(name, valid) or f" Options of '{method}' are {_listed(parameters)}."
            mistakes.append(f"search.{name}: unknown key.{guess}")
            continue
        annotation = hints.get(name, Any)
        if _is_absurd(value):
            mistakes.append(
                f"search.{name}: whole numbers may be at most {MOST_OF_ANYTHING}, others {LARGEST_NUMBER:g}, "
                f"got {_shown(value)}"
            )
            continue
        try:
            _typed(annotation, value)
            values[name] = value
        except PydanticSchemaGenerationError:
            mistakes.append(f"search.{name}: this option takes a Python object and can only be set from Python")
        except TypeError:
            mistakes.append(f"search.{name}: dates and times have no meaning here")
        except ValidationError as problem:
            details = {error["type"]: error["msg"] for error in problem.errors()}
            if set(details) & {
                "value_error",
                "greater_than",
                "greater_than_equal",
                "less_than",
                "less_than_equal",
            }:
                expected = "; ".join(message[0].lower() + message[1:] for message in details.values())
            else:
                expected = f"expected {described(annotation)}"
            mistakes.append(f"search.{name}: {expected}, got {_shown(value)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in (given or {}):
            mistakes.append(f"search.{name}: the method '{method}' needs this key ({described(hints.get(name, Any))})")
    if mistakes:
        raise ConfigurationError("\n".join(mistakes[:20]))
    return values


def _is_absurd(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, list, tuple, Mapping)):
        return False
    if isinstance(value, int):
        return abs(value) > MOST_OF_ANYTHING
    if isinstance(value, float):
        return not abs(value) <= LARGEST_NUMBER
    return any(map(_is_absurd, value.values() if isinstance(value, Mapping) else value))


def typed_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options as the recipe wants them: tuples, and tables with whole numbers as keys."""
    from thalweg.recipes import RECIPES

    hints = _annotations(RECIPES[method])
    return {name: _typed(hints.get(name, Any), value) for name, value in options.items()}


def _typed(annotation: Any, value: Any) -> Any:
    # JSON mode is strict about types and yet takes a list for a tuple and "5" for a key that is a number
    model: Any = create_model("Option", __config__=_STRICT, value=(annotation, ...))
    return model.model_validate_json(json.dumps({"value": value})).value


def _annotations(recipe: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(recipe, include_extras=True)
    except Exception:
        return {}


def _fits_toml(value: Any) -> bool:
    if isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, (list, tuple)):
        return all(map(_fits_toml, value))
    return isinstance(value, Mapping) and all(isinstance(k, (str, int)) and _fits_toml(v) for k, v in value.items())


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


# ---- words for people ----------------------------------------------------------------------------------------

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    type(None): "nothing",
}


def described(annotation: Any) -> str:
    """A type annotation in words: `int | Literal["all"]` -> 'a whole number or "all"'."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(arguments[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in arguments if one is not type(None))
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inner = [one for one in arguments if one is not Ellipsis]
        if origin is tuple and Ellipsis not in arguments and inner:
            return "[" + ", ".join(described(one) for one in inner) + "]"
        return "a list of " + described(inner[0]).removeprefix("a ") + "s" if inner else "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if arguments and arguments[0] is int:
            return "a table from iteration to value such as {0 = ..., 5 = ...}"
        inner = [one for one in arguments[1:] if one is not Any]
        return f"a table that gives each name {described(inner[0])}" if inner else "a table"
    return getattr(annotation, "__name__", str(annotation))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    try:
        text = json.dumps(value, default=str) if not isinstance(value, float) else repr(value)
    except ValueError:  # numbers of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(problem: BaseException) -> str:
    return str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _raise_if(mistakes: list[str], source: str) -> None:
    if mistakes:
        lines = [mistake if len(mistake) <= 600 else f"{mistake[:600]}..." for mistake in mistakes[:20]]
        raise ConfigurationError("\n".join(f"{source}: {line}" for line in lines))


def _checked(model: type[BaseModel], data: Mapping[str, Any], section: str, mistakes: list[str]) -> Any:
    try:
        return model.model_validate(dict(data))
    except ValidationError as problem:
        lines: dict[str, str] = {}
        # a misspelt key is also a missing one: say the former
        for error in sorted(problem.errors(), key=lambda one: one["type"] != "extra_forbidden"):
            lines.setdefault(str(error["loc"][0]), _line(model, section, error))
        mistakes.extend(lines.values())
        return None


def _line(model: type[BaseModel], section: str, error: Any) -> str:
    """One line for one error of pydantic's."""
    where, fields = [section], model.model_fields
    for part in error["loc"]:
        where.append(str(part))
    key, kind, value = ".".join(where), error["type"], error["input"]
    if kind in ("extra_forbidden", "missing"):
        for part in error["loc"][:-1]:  # a nested section, such as search.target
            inner = [one for one in (get_args(fields[part].annotation) or [fields[part].annotation])]
            fields = next(one.model_fields for one in inner if isinstance(one, type) and issubclass(one, BaseModel))
    if kind == "extra_forbidden":
        valid = [name for name in fields]
        guess = nearest(str(error["loc"][-1]), valid) or f" Keys here are {_listed(valid)}."
        return f"{key}: unknown key.{guess}"
    if kind == "missing":
        return f"{key}: this key is missing"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}, got {_shown(value)}"
    words = {
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected a text in quotes",
        "model_type": "expected a table such as {energy = 7.8049, tolerance = 0.001}",
        "greater_than": f"must be greater than {error.get('ctx', {}).get('gt')}",
        "greater_than_equal": f"must be at least {error.get('ctx', {}).get('ge')}",
        "less_than": f"must be less than {error.get('ctx', {}).get('lt')}",
        "less_than_equal": f"must be at most {error.get('ctx', {}).get('le')}",
        "finite_number": "expected a finite number",
    }
    return f"{key}: {words.get(kind, error['msg'])}, got {_shown(value)}"


# ---- calculators and templates -------------------------------------------------------------------------------


def make_calculator(name: str, **arguments: Any) -> Any:
    """`thalweg.calculators.make_calculator` that also finds "module:factory" in the working folder."""
    from thalweg import calculators

    _find_factories_here(name)
    try:
        return calculators.make_calculator(name, **arguments)
    except ConfigurationError as problem:
        raise ConfigurationError(f"calculator: {problem}") from problem


def _find_factories_here(name: str) -> None:
    here = os.getcwd()
    if ":" in name and here not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there by itself


def _scratch(text: str) -> Path:
    """A folder in which ~ and variables of the environment stand for their values; made if it is not there."""
    path = Path(os.path.expandvars(os.path.expanduser(text)))
    if "$" in str(path):
        raise ConfigurationError(f"calculator.scratch: a variable in '{text}' is not set in the environment")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigurationError(f"calculator.scratch: cannot make the folder '{path}': {problem.strerror}") from None
    return path.absolute()


def _read_template(path: Path) -> Any:
    from thalweg.importing import read_file

    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigurationError(f"problem.template: there is no file '{path}'.{nearest(path.name, others)}")
    try:
        return read_file(path)[-1]
    except ConfigurationError as problem:
        raise ConfigurationError(f"problem.template: {problem}") from problem
