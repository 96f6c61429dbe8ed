"""The search, written once: sample -> propose -> refine -> acquire -> evaluate -> settle -> store."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, Stop, StoreError, ThalwegError
from thalweg.randomness import Key
from thalweg.records import FAILED, OK, Asked, Batch, Context, Measured, Problem, Step
from thalweg.store import Store, check_row

__all__ = ["Found", "Search"]

Stages = Callable[..., Any] | Sequence[Callable[..., Any]] | None


class _Halt(Exception):
    """Ends a run between two evaluations; the open ticket stays open and is resumed later."""


@dataclass(frozen=True)
class Found:
    """What a run ended with. `best`: the structure with the lowest objective (None if nothing was evaluated), `energy`
    its objective [eV], `evaluations` true evaluations so far, `reason` why the run ended."""

    best: Batch | None
    energy: float
    evaluations: int
    iterations: int
    reason: str


class Search:
    """One search, owned by its store.

    Parameters
    ----------
    problem : Problem
    sample : stage, optional
        Context -> Batch of known structures for the generators. Default: none.
    propose : stage or list
        Context -> Batch of candidates each; their candidates are joined in order.
    refine : stage or list
        (Batch, Context) -> Batch each, in sequence.
    acquire : stage, optional
        (Batch, Context) -> (n,) scores; low is evaluated first. Default: the order in which candidates came.
    choose : int or "all"
        How many candidates must pass the gauges in each iteration; one that fails is replaced by the next in order.
    evaluate : stage or list
        The gauges: (Batch, Context) -> Batch each, in order. A row whose status is not 0 afterwards has failed.
    settle : stage or list
        (Batch, Context) -> Batch each: acceptance, rewards, population rules.
    models : mapping of name to model
        `fit(data, previous, key=...)` is called before each iteration; a model with `bound(problem)` is told the problem
        first. A fitted model's `state` (arrays by name) is stored with each ticket; one that holds "partial" adds to the
        last that does not.
    store : path, Store or None
        None keeps the journal in memory. An existing store of the same search is continued.
    seed : int
    callbacks : list of observers
        Called as (step, search) after every iteration; may raise Stop.
    threads : int
        For the kernels; 0: all cores this process may use. The rows do not depend on it.

    Raises
    ------
    ConfigurationError
        If two stages share a name, or nothing proposes or evaluates.
    StoreError
        If the store belongs to another search or another process.
    """

    #: A run ends with an error after this many steps in a row without one usable energy.
    barren_steps = 20

    def __init__(
        self,
        problem: Problem,
        *,
        sample: Callable[[Context], Batch] | None = None,
        propose: Stages,
        refine: Stages = None,
        acquire: Callable[[Batch, Context], Any] | None = None,
        choose: int | str = 1,
        evaluate: Stages,
        settle: Stages = None,
        models: Mapping[str, Any] | None = None,
        store: str | Path | Store | None = None,
        seed: int = 0,
        callbacks: Sequence[Callable[[Step, Search], None]] = (),
        threads: int = 0,
    ):
        self.problem, self.sample, self.acquire = problem, sample, acquire
        self.propose, self.refine = _stages(propose, "propose"), _stages(refine, "refine", empty=True)
        self.gauges, self.settle = _stages(evaluate, "evaluate"), _stages(settle, "settle", empty=True)
        self.models = {
            name: model.bound(problem) if hasattr(model, "bound") else model for name, model in (models or {}).items()
        }
        self.callbacks = list(callbacks)
        self.seed, self.threads = int(seed), int(threads) or _core.default_threads()
        if choose != "all" and (not isinstance(choose, int) or choose < 1):
            raise ConfigurationError(f"choose must be a whole number of at least 1 or 'all', got {choose!r}")
        self.choose = choose
        self._check_names()
        for stage in [*self.propose, *self.gauges]:
            if hasattr(stage, "check"):
                stage.check(problem)

        self._key = Key.of(self.seed)
        self._data = Batch.empty()
        self._new_rows: list[Batch] = []
        self._features: dict[Any, np.ndarray] = {}
        self._fitted: dict[str, Any] = {}
        self._carry: dict[str, Mapping[str, np.ndarray]] = {}
        self._kept: dict[int, dict[str, Mapping[str, np.ndarray]]] = {}
        self._last: Step | None = None
        self._pending: dict[int, Batch] = {}
        self._seconds: dict[int, dict[str, float]] = {}
        self._journal: dict[int, list[Batch]] = {}
        self._to_replay: dict[int, list[Batch]] = {}
        self._open: list[Asked] = []
        self._measuring: Asked | None = None
        self._stop_reason: str | None = None
        self._budget: int | None = None
        self._barren, self._last_reason, self._finished = 0, "", False
        self._asked, self._finishes, self.iteration, self.evaluations = 0, 0, 0, 0
        self._store = store if isinstance(store, Store) else Store(store, self._meta())
        try:
            self._resume()
        except ThalwegError:
            self._store.close()
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as problem:
            self._store.close()
            raise StoreError(
                f"{self._store.path or 'the store'} cannot be continued: it does not hold what this search writes "
                f"({type(problem).__name__}: {problem})"
            ) from problem
        except BaseException:
            self._store.close()
            raise

    # ---- the loop ----------------------------------------------------------------------------------
    def run(self, iterations: int, *, evaluations: int | None = None) -> Found:
        """Runs that many iterations more, then lets the gauges finish (a last polish, counted); run again to continue.

        Ends early, and without the finish, when an observer raises Stop, the evaluations are spent, or a stop was
        requested; what was open then is resumed by the next run.

        Parameters
        ----------
        iterations : int
        evaluations : int, optional
            Ends the run when the search has made this many true evaluations in all.
        """
        self._budget, reason = evaluations, "iterations"
        last = self.iteration + int(iterations)
        try:
            while self.iteration < last:
                self.tell(asked := self.ask(), self.evaluate(asked))
            self._finish()
        except Stop as stop:
            reason = str(stop) or "an observer stopped the run"
        except _Halt as halt:
            reason = str(halt)
        self._store.commit()
        return Found(self.best, self.best_energy, self.evaluations, self.iteration, reason)

    def steps(self, iterations: int) -> Iterator[Step]:
        """The same iterations, one step at a time, without the finishing touch: `for step in search.steps(100)`."""
        for _ in range(iterations):
            asked = self.ask()
            yield self.tell(asked, self.evaluate(asked))

    def ask(self) -> Asked:
        """The first half: what should be evaluated. Tickets that were open when the store was left come first; several
        may be in flight."""
        if self._open:
            return self._open.pop(0)
        seconds: dict[str, float] = {}
        with _timed(seconds, "model"):
            self._fitted = {
                name: model.fit(self.data, self._fitted.get(name), key=self._key.fold(self._asked, "model", name))
                for name, model in self.models.items()
            }
        context = self._context(self._asked, self.data, self._fitted, self._last, self._carry, self._pending_batch())
        asked = self._compose(self._asked, context, seconds)
        self._enter(asked, seconds)
        return asked

    def _compose(self, ticket: int, context: Context, seconds: dict[str, float]) -> Asked:
        """sample -> propose -> refine -> acquire, for a new ticket and again for one that is re-issued."""
        if self.sample is not None:
            with _timed(seconds, "sample"):
                context = replace(context, sample=self.sample(self._at(context, "sample", self.sample)))
        with _timed(seconds, "propose"):
            batches = []
            for stage in self.propose:
                here = self._at(context, "propose", stage)
                batches.append(stage(here).with_columns(origin=here.stage))
            candidates = proposed = Batch.concat(batches)
        with _timed(seconds, "refine"):
            for stage in self.refine:
                candidates = stage(candidates, self._at(context, "refine", stage))
        with _timed(seconds, "acquire"):
            scores = np.zeros(len(candidates))
            if self.acquire is not None and len(candidates):
                scores = np.asarray(self.acquire(candidates, self._at(context, "acquire", self.acquire)), float)
                candidates = candidates.with_columns(score=scores)
            order = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")
        wanted = len(order) if self.choose == "all" else min(int(self.choose), len(order))
        return Asked(ticket, context, proposed, candidates, order, wanted)

    def evaluate(self, asked: Asked) -> Batch:
        """The gauges, in order, on the chosen candidates; for each that fails, the next in acquisition order."""
        self._measuring = asked
        begin = time.perf_counter()
        queue, passed, rows = list(asked.order), 0, []
        finishing = asked.kind == "finish"
        gauges: list[Any] = [g for g in self.gauges if hasattr(g, "finish") or not finishing]
        try:
            while queue and passed < asked.wanted:
                now, queue = queue[: asked.wanted - passed], queue[asked.wanted - passed :]
                # `point` counts the measurements of a ticket; -1: refused before it was measured
                batch = asked.refined.take(now).with_columns(candidate=np.array(now), point=-1)
                for gauge in gauges:
                    here = self._at(asked.context, "evaluate", gauge)
                    through = gauge.finish(batch, here) if finishing else gauge(batch, here)
                    rows.append(through.take(~_passed(through)))
                    batch = through.take(_passed(through))
                    if not len(batch):
                        break
                rows.append(batch)
                passed += len(now) if finishing else len(_candidates(batch))
        except BaseException:
            self._reopen(asked)
            raise
        finally:
            self._measuring = None
        self._seconds.setdefault(asked.ticket, {})["evaluate"] = time.perf_counter() - begin
        return Batch.concat(rows)

    def tell(self, asked: Asked, evaluated: Batch) -> Step:
        """The second half: settles a ticket, once. `evaluated` has the columns energy and status and the atom column
        forces; a caller who owns the calculator may build it from `asked.chosen`.

        Raises ThalwegError if the ticket is not open.
        """
        if asked.ticket not in self._pending:
            raise ThalwegError(f"ticket {asked.ticket} is not open: a ticket is told once, and must come from ask()")
        spent = self._seconds.pop(asked.ticket, {})
        seconds = {"evaluate": spent.pop("evaluate", 0.0)}
        if len(evaluated) and "point" not in evaluated.columns:
            evaluated = self._record_foreign(asked, evaluated)
        try:
            with _timed(seconds, "settle"):
                for stage in self.settle if asked.kind == "search" else []:  # a last polish decides nothing
                    evaluated = stage(evaluated, self._at(asked.context, "settle", stage))
            settled = self._settled_columns(asked.ticket, evaluated)
            kept = self._kept.pop(asked.context.iteration, {})
            body = {"kind": asked.kind, "columns": settled, "kept": kept}
            self._store.append("told", asked.ticket, body, timing=seconds)
        except BaseException:
            self._reopen(asked)
            raise
        self._carry = {**self._carry, **kept}
        self._learn(asked.ticket, asked.kind, asked.context.iteration, asked.chosen, settled)
        carry = MappingProxyType(self._carry)
        step = Step(
            asked.context.iteration, asked.proposed, asked.refined, asked.chosen, evaluated, carry, {**spent, **seconds},
            asked.kind,
        )  # fmt: skip
        if asked.kind == "search" or len(evaluated):
            for observer in self.callbacks:
                observer(step, self)
        if self._barren >= self.barren_steps:
            self._store.commit()
            raise ThalwegError(
                f"{self._barren} steps in a row gave no usable energy"
                + (f"; the last reason: {self._last_reason}" if self._last_reason else "; no candidate could be built")
            )
        return step

    def _reopen(self, asked: Asked) -> None:
        """After an interruption or an error: the ticket is issued again, what it has measured is not measured twice."""
        self._to_replay[asked.ticket] = self._journal.pop(asked.ticket, []) + self._to_replay.get(asked.ticket, [])
        self._kept.pop(asked.context.iteration, None)
        self._open.insert(0, asked)

    # ---- what there is -----------------------------------------------------------------------------
    @property
    def data(self) -> Batch:
        """Every true evaluation told so far."""
        if self._new_rows:
            self._data, self._new_rows = Batch.concat([self._data, *self._new_rows]), []
        return self._data

    @property
    def fitted(self) -> Mapping[str, Any]:
        """The models as the last ask() left them."""
        return MappingProxyType(self._fitted)

    @property
    def best(self) -> Batch | None:
        """The structure with the lowest objective so far, or None."""
        objective = self.problem.objective(self.data)
        return None if not np.any(np.isfinite(objective)) else self.data[int(np.nanargmin(objective))]

    @property
    def best_energy(self) -> float:
        """Its objective [eV]; NaN if there is none."""
        best = self.best
        return float("nan") if best is None else float(self.problem.objective(best)[0])

    def request_stop(self, reason: str) -> None:
        """Ends the run before its next true evaluation; safe to call from a signal handler or another thread."""
        self._stop_reason = reason

    def close(self) -> None:
        """Commits and releases the store."""
        self._store.close()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    # ---- true evaluations --------------------------------------------------------------------------
    def measure(self, structure: Batch, calculate: Callable[[Batch], Measured], columns: Mapping[str, Any]) -> Batch:
        """`Context.measure`: journaled as it arrives; what the journal already holds for this ticket is replayed."""
        asked = self._measuring
        assert asked is not None, "measure() belongs to the gauges of a search"
        journal = self._journal.setdefault(asked.ticket, [])
        known = self._replayed(asked, structure, len(journal))
        if known is not None:
            return known
        halt = self._why_halt(self.evaluations)
        if halt:
            raise _Halt(halt)
        begin = time.perf_counter()
        measured = calculate(structure)
        return self._record(asked, structure, measured, columns, len(journal), time.perf_counter() - begin)

    def measure_many(
        self,
        structures: Batch,
        calculate: Callable[[Iterator[Batch]], Iterable[tuple[int, Measured, float]]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Batch:
        """`Context.measure_many`: each row has the number (`point`) that it would have had one after the other, whatever
        the order in which the results arrive and are journaled."""
        asked = self._measuring
        assert asked is not None, "measure_many() belongs to the gauges of a search"
        journal = self._journal.setdefault(asked.ticket, [])
        first, n = len(journal), len(structures)
        rows = {i: self._replayed(asked, structures[i], first + i) for i in range(n)}
        missing = [i for i in range(n) if rows[i] is None]
        halt, before = "", self.evaluations

        def to_do() -> Iterator[Batch]:
            nonlocal halt
            for handed, i in enumerate(missing):
                halt = self._why_halt(before + handed)
                if halt:
                    return
                yield structures[i]

        results = calculate(to_do())
        try:
            for k, measured, cost in results:
                i = missing[k]
                rows[i] = self._record(asked, structures[i], measured, columns[i], first + i, cost)
        finally:
            if hasattr(results, "close"):  # what is still running is ended at once, not when somebody collects it
                results.close()
        if halt:
            raise _Halt(halt)
        ordered = [row for row in (rows[i] for i in range(n)) if row is not None]
        assert len(ordered) == n, "calculate must give a result for every structure"
        journal[first:] = ordered
        return Batch.concat(ordered)

    def _replayed(self, asked: Asked, structure: Batch, point: int) -> Batch | None:
        """The measurement of this number, if the journal has it; it is then journaled again."""
        recorded = self._to_replay.get(asked.ticket, [])
        row = next((row for row in recorded if row.columns["point"][0] == point), None)
        if row is None:
            return None
        if not np.array_equal(row.positions, structure.positions):
            raise StoreError(
                "the store holds evaluations that this search would not make: it was written by another build or on "
                f"another processor (now {build()}); resume it there, or start a new store"
            )
        self._to_replay[asked.ticket] = [other for other in recorded if other is not row]
        self._journal[asked.ticket].append(row)
        return row

    def _why_halt(self, evaluations: int) -> str:
        """Why no further evaluation may begin when so many have begun; empty if it may."""
        if self._stop_reason is not None:
            return self._stop_reason
        return "evaluations" if self._budget is not None and evaluations >= self._budget else ""

    def _record(
        self, asked: Asked, structure: Batch, measured: Measured, columns: Mapping[str, Any], point: int, cost: float
    ) -> Batch:
        energy, forces, reason = measured
        row = structure.bare().with_columns(
            energy=energy, status=np.uint8(FAILED if reason else OK), **columns,
            iteration=asked.context.iteration, ticket=asked.ticket, point=point,
        )  # fmt: skip
        row = row.with_atom_columns(forces=forces)
        self._journal[asked.ticket].append(row)
        self.evaluations += 1
        self._store.append("evaluation", asked.ticket, {"row": row, "reason": reason}, cost=cost)
        self._last_reason = reason or self._last_reason
        return row

    def _record_foreign(self, asked: Asked, evaluated: Batch) -> Batch:
        """Evaluations that the caller made between ask() and tell()."""
        if "energy" not in evaluated.columns:
            raise ThalwegError("tell() needs the column energy (NaN for a failed evaluation)")
        forces = evaluated.atom_columns.get("forces", np.full_like(evaluated.positions, np.nan))
        evaluated = evaluated.with_atom_columns(forces=forces)
        told = ("energy", "status", "iteration", "ticket", "point")
        rows = []
        self._measuring = asked
        try:
            for i in range(len(evaluated)):
                row = evaluated[i]
                given = (
                    float(row.columns["energy"][0]),
                    row.atom_columns["forces"],
                    "" if row.ok[0] else "told as failed",
                )
                columns = {name: values[0] for name, values in row.columns.items() if name not in told}
                rows.append(self.measure(row, partial(_told, given), columns))
        finally:
            self._measuring = None
        return Batch.concat(rows)

    def _settled_columns(self, ticket: int, evaluated: Batch) -> dict[str, np.ndarray]:
        """Columns of all measured rows of a ticket, with what the settling stages added where they kept the row."""
        rows = Batch.concat(self._journal.get(ticket, []))
        if not len(rows):
            return {}
        columns = {name: values.copy() for name, values in rows.columns.items()}
        kept = evaluated.take(evaluated.columns["point"] >= 0) if "point" in evaluated.columns else Batch.empty()
        for name, values in kept.columns.items():
            if name not in columns:
                columns[name] = _column_of(values, len(rows))
            if name not in ("point", "ticket", "iteration"):
                target = columns[name]
                if values.dtype.kind == "U" and values.dtype.itemsize > target.dtype.itemsize:
                    target = columns[name] = target.astype(values.dtype)
                target[kept.columns["point"]] = values
        return columns

    # ---- the finishing touch -----------------------------------------------------------------------
    def _finish(self) -> None:
        """A last ticket in which the gauges may polish the best structures; counted like any other evaluation."""
        if self._finished:
            return
        asked = next((ticket for ticket in self._open if ticket.kind == "finish"), None)
        if asked is not None:
            self._open.remove(asked)
        else:
            context = self._context(
                self._asked, self.data, self._fitted, self._last, self._carry, Batch.empty(), "finish"
            )
            batches = [
                gauge.finish_with(self._at(context, "finish", gauge))
                for gauge in self.gauges
                if hasattr(gauge, "finish_with")
            ]
            chosen = Batch.concat(batches) if batches else Batch.empty()
            # Numbered downwards: runs of 3 and 3 iterations give the tickets that a run of 6 gives.
            asked = Asked(
                -1 - self._finishes,
                context,
                Batch.empty(),
                chosen,
                np.arange(len(chosen)),
                len(chosen),
                "finish",
            )
            self._enter(asked, {})
        self.tell(asked, self.evaluate(asked))

    # ---- contexts ----------------------------------------------------------------------------------
    def _context(
        self,
        iteration: int,
        data: Batch,
        fitted: Mapping[str, Any],
        last: Step | None,
        carry: Mapping[str, Mapping[str, np.ndarray]],
        pending: Batch,
        kind: str = "search",
    ) -> Context:
        return Context(
            self.problem, data, Batch.empty(), pending, MappingProxyType(dict(fitted)), last,
            MappingProxyType(dict(carry)), iteration, self._key.fold(kind, iteration), "", self,
        )  # fmt: skip

    def _at(self, context: Context, kind: str, stage: Any) -> Context:
        """The context as one stage sees it: with a key of its own."""
        name = _name(stage)
        return replace(context, key=context.key.fold(kind, name), stage=name)

    def _pending_batch(self) -> Batch:
        return Batch.concat(list(self._pending.values())) if self._pending else Batch.empty()

    def keep(self, iteration: int, stage: str, arrays: Mapping[str, np.ndarray]) -> None:
        """`Context.keep`: what the stages of the first half keep is stored with `asked`, of the second with `told`."""
        self._kept.setdefault(iteration, {})[stage] = MappingProxyType(dict(arrays))

    def features(self, descriptor: Any, data: Batch) -> np.ndarray:
        """`Context.features`: rows are computed once; data only grows."""
        known = self._features.get(descriptor)
        have = 0 if known is None else len(known)
        if have < len(data):
            new = descriptor.values(data[have:], threads=self.threads)
            known = new if known is None else np.concatenate([known, new])
            self._features[descriptor] = known
        return known[: len(data)] if known is not None else np.zeros((0, 0))

    # ---- the journal -------------------------------------------------------------------------------
    def _enter(self, asked: Asked, seconds: Mapping[str, float]) -> None:
        """Records what was asked and makes it pending."""
        kept = self._kept.pop(asked.context.iteration, {})
        body = {
            "kind": asked.kind,
            "iteration": asked.context.iteration,
            "horizon": len(asked.context.data),
            "models": {name: fitted.state for name, fitted in asked.context.models.items() if hasattr(fitted, "state")},
            "chosen": asked.chosen,
            "kept": kept,
        }
        self._store.append("asked", asked.ticket, body, timing=seconds)
        self._seconds[asked.ticket] = dict(seconds)
        self._carry = {**self._carry, **kept}
        self._pending[asked.ticket] = asked.chosen
        self._count(asked.kind)

    def _count(self, kind: str) -> None:
        self._asked += kind == "search"
        self._finishes += kind == "finish"
        self._finished = False

    def _learn(self, ticket: int, kind: str, iteration: int, chosen: Batch, columns: Mapping[str, np.ndarray]) -> None:
        """What a told ticket changes; the same when it is told and when the journal is read back."""
        # the journal has them in the order in which they arrived
        rows = Batch.concat(sorted(self._journal.pop(ticket, []), key=lambda row: int(row.columns["point"][0])))
        if len(rows):
            rows = replace(rows, columns=columns)
            self._new_rows.append(rows)
        self._pending.pop(ticket, None)
        self._to_replay.pop(ticket, None)
        self.iteration += kind == "search"
        self._finished = kind == "finish"
        # A step whose candidates were all refused as copies is no failure: the search may simply be done.
        failed = not np.any(rows.ok) and (len(rows) > 0 or len(chosen) == 0)
        self._barren = self._barren + 1 if failed and kind == "search" else 0
        empty = Batch.empty()
        self._last = Step(iteration, empty, empty, chosen, rows, MappingProxyType(dict(self._carry)))

    def _resume(self) -> None:
        """Rebuilds everything from the journal and re-issues the tickets that were open."""
        open_tickets: dict[int, tuple[Mapping[str, Any], Context]] = {}
        state: Mapping[str, Any] = {}
        whole: dict[str, Mapping[str, Any]] = {}  # the last states that are not partial
        horizon = 0
        for record in self._store.records():
            body = record.body
            if record.kind == "asked":
                context = self._context(
                    body["iteration"],
                    self.data,
                    {},
                    self._last,
                    self._carry,
                    self._pending_batch(),
                    body["kind"],
                )
                open_tickets[record.ticket] = body, replace(context, data=self.data[: body["horizon"]])
                self._carry = {**self._carry, **_frozen_carry(body["kept"])}
                self._pending[record.ticket] = body["chosen"]
                self._count(body["kind"])
                for name, arrays in body["models"].items():
                    if "partial" not in arrays:
                        whole[name] = arrays
                body = {**body, "models": {n: {**whole.get(n, {}), **arrays} for n, arrays in body["models"].items()}}
                open_tickets[record.ticket] = body, open_tickets[record.ticket][1]
                if body["kind"] == "search":
                    state, horizon = body["models"], body["horizon"]
            elif record.kind == "evaluation":
                check_row(body["row"])
                self._journal.setdefault(record.ticket, []).append(body["row"])
                self.evaluations += 1
                self._last_reason = str(body["reason"]) or self._last_reason
            else:
                asked, context = open_tickets.pop(record.ticket)
                self._carry = {**self._carry, **_frozen_carry(body["kept"])}
                self._learn(record.ticket, body["kind"], context.iteration, asked["chosen"], body["columns"])
        self._fitted = self._restore(state, self.data[:horizon])
        for ticket, (body, context) in open_tickets.items():
            self._to_replay[ticket] = self._journal.pop(ticket, [])
            self._open.append(self._reissue(ticket, body, context))

    def _reissue(self, ticket: int, body: Mapping[str, Any], context: Context) -> Asked:
        """An open ticket again: its candidates are computed anew (they are not stored) and must agree with the record;
        if another build computes others, the recorded choice stands alone."""
        chosen: Batch = body["chosen"]
        context = replace(context, models=MappingProxyType(self._restore(body["models"], context.data)))
        if body["kind"] == "finish":
            return Asked(ticket, context, Batch.empty(), chosen, np.arange(len(chosen)), len(chosen), "finish")
        asked = self._compose(ticket, context, {})
        self._kept.pop(context.iteration, None)  # it is in the record already
        if not np.array_equal(asked.chosen.positions, chosen.positions):
            asked = Asked(ticket, asked.context, asked.proposed, chosen, np.arange(len(chosen)), len(chosen))
        return asked

    def _restore(self, states: Mapping[str, Any], data: Batch) -> dict[str, Any]:
        return {name: self.models[name].restore(data, state) for name, state in states.items() if name in self.models}

    def _meta(self) -> dict[str, str]:
        """What defines this search; a store that was written by another one is refused."""
        configuration = {
            "sample": describe(self.sample),
            "propose": [describe(stage) for stage in self.propose],
            "refine": [describe(stage) for stage in self.refine],
            "acquire": describe(self.acquire),
            "choose": self.choose,
            "evaluate": [describe(stage) for stage in self.gauges],
            "settle": [describe(stage) for stage in self.settle],
            "models": {name: describe(model) for name, model in self.models.items()},
        }
        return {
            "problem": self.problem.to_json(),
            "configuration": json.dumps(configuration, sort_keys=True),
            "seed": str(self.seed),
            "build": build(),
        }

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        groups = {
            "propose": self.propose,
            "refine": self.refine,
            "evaluate": self.gauges,
            "settle": self.settle,
        }
        for group, stages in groups.items():
            for stage in stages:
                if not callable(stage):
                    raise ConfigurationError(f"every stage of {group} must be callable, but {stage!r} is not")
                name = f"{group}/{_name(stage)}"
                if name in seen:
                    raise ConfigurationError(
                        f"two stages of {group} are named '{_name(stage)}'; give one of them name=... (names say which "
                        "random numbers a stage draws)"
                    )
                seen[name] = group


# ---- helpers -----------------------------------------------------------------------------------------------


def build() -> str:
    """What the bits of a result depend on: version and instruction set."""
    return f"thalweg {_core.__version__}, {_core.active_isa()}"


def describe(element: Any) -> Any:
    """An element and its settings as text that is equal for equal elements, in any process."""
    if element is None or isinstance(element, (bool, int, float, str)):
        return element
    if hasattr(element, "describe"):
        return element.describe()
    if dataclasses.is_dataclass(element) and not isinstance(element, type):
        settings = {f.name: describe(getattr(element, f.name)) for f in dataclasses.fields(element) if f.repr}
        return {type(element).__name__: settings}
    if isinstance(element, Mapping):
        return {str(name): describe(value) for name, value in element.items()}
    if isinstance(element, (list, tuple)):
        return [describe(value) for value in element]
    if isinstance(element, np.ndarray):
        return element.tolist()
    if hasattr(element, "implemented_properties"):  # an ASE calculator
        parameters = getattr(element, "parameters", None) or {}
        return {
            type(element).__name__: {str(name): describe(value) for name, value in sorted(dict(parameters).items())}
        }
    if hasattr(element, "__qualname__"):
        return f"{element.__module__}.{element.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(element))


def _told(given: Measured, structure: Batch) -> Measured:
    """The calculation that the caller of tell() has already made."""
    return given


def _name(stage: Any) -> str:
    name = getattr(stage, "name", None) or getattr(stage, "__name__", None)
    return str(name) if name else type(stage).__name__


def _stages(stages: Stages, kind: str, *, empty: bool = False) -> list[Callable[..., Any]]:
    found = [] if stages is None else list(stages) if isinstance(stages, (list, tuple)) else [stages]
    if not found and not empty:
        raise ConfigurationError(f"a search needs at least one stage to {kind}")
    return found  # type: ignore[return-value]


def _passed(batch: Batch) -> np.ndarray:
    """(n,) bool: rows that a gauge let through (an energy need not be there yet)."""
    status = batch.columns.get("status")
    return np.ones(len(batch), bool) if status is None else status == OK


def _candidates(batch: Batch) -> np.ndarray:
    """The candidates that have rows here; rows of a polish (candidate -1) belong to none."""
    candidates = np.unique(batch.columns["candidate"])
    return candidates[candidates >= 0]


def _column_of(values: np.ndarray, n: int) -> np.ndarray:
    from thalweg.records import _fill

    return _fill(values.dtype, (n, *values.shape[1:]))


def _frozen_carry(kept: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Mapping[str, np.ndarray]]:
    return {name: MappingProxyType(dict(arrays)) for name, arrays in kept.items()}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
