"""ASLA: an agent that learns to build structures atom by atom (atomistic structure learning; thesis ch. 4 to 6; Meldgaard,
Mortensen, Jorgensen, Hammer, J. Phys.: Condens. Matter 32, 404005 (2020)).

    Agent     model: learns Q(state, action) from every evaluated structure, one training step per episode
    Build     generator: new structures by the agent's policy
    Rebuild   generator: members of the sample with a few neighbouring atoms taken out and built anew
    Snap      postprocessing: moves placed atoms to the grid

The target of a state-action pair is the reward of the best episode that contains it (4.1), whatever the order in which
the atoms of its state were placed:

    reward(E) = 1 - 2 (E - E_best) / span, at least -1
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, check_whole, nearest
from thalweg.grid import Grid, GridSettings
from thalweg.randomness import Key
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled

if TYPE_CHECKING:
    from thalweg.records import Problem

__all__ = ["Agent", "Build", "Policy", "Rebuild", "Snap"]

Array = np.ndarray
# Q (species, voxels) of each of n states, wanted where an action is allowed (n, species, voxels).
QMaps = Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]

REPRESENTATIONS = ("one-hot", "gaussian", "agr", "displaced", "harmonics")


@dataclass(frozen=True)
class Policy:
    """How an action is chosen among those allowed.

    Parameters
    ----------
    kind : "epsilon-greedy", "softmax" or "uniform"
        Epsilon-greedy: with probability `epsilon` a random action, else the one of largest Q. Of the random ones a share
        `uniform` is drawn from all, the others from the part `top` with the largest Q (Paper IV; "the top few percent" of
        the thesis). Softmax: with probabilities exp(Q / temperature). Uniform: any, for comparison.
    epsilon : float or None
        None: 1 / (number of atoms to place).
    """

    kind: str = "epsilon-greedy"
    epsilon: float | None = None
    uniform: float = 0.5
    top: float = 0.05
    temperature: float = 0.05

    def __post_init__(self) -> None:
        kinds = ("epsilon-greedy", "softmax", "uniform")
        if self.kind not in kinds:
            raise ConfigurationError(
                f"policy must be one of {', '.join(map(repr, kinds))}, got {self.kind!r}.{nearest(str(self.kind), kinds)}"
            )
        for name in ("epsilon", "uniform", "top"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigurationError(f"{name} of a policy lies between 0 and 1, got {value!r}")
        if not self.temperature > 0:
            raise ConfigurationError(f"the temperature of a policy must be above 0, got {self.temperature!r}")

    @property
    def asks(self) -> bool:
        """Whether it needs Q at all."""
        return self.kind != "uniform"

    def choose(self, q: Array, allowed: Array, atoms: int, rng: np.random.Generator) -> int:
        """Which of the flat actions: q and allowed (S * V,)."""
        actions = np.flatnonzero(allowed)
        if self.kind == "uniform":
            return int(rng.choice(actions))
        values = q[actions]
        if self.kind == "softmax":
            weights = np.exp((values - values.max()) / self.temperature)
            return int(rng.choice(actions, p=weights / weights.sum()))
        epsilon = 1.0 / atoms if self.epsilon is None else self.epsilon
        if rng.random() >= epsilon:
            return int(actions[np.argmax(values)])
        if rng.random() < self.uniform:
            return int(rng.choice(actions))
        count = max(1, round(self.top * len(actions)))
        best = actions[np.argpartition(-values, count - 1)[:count]]
        return int(rng.choice(np.sort(best)))


# ---- building ----------------------------------------------------------------------------------------------


def build(
    grid: Grid, q_maps: QMaps, policy: Policy, starts: Sequence[Array], keys: Sequence[Key]
) -> list[Array | None]:
    """Complete builds (k, 2), each from a start of rows already placed (the template's not among them); in step, so that Q
    of all of them comes from one call, and builds that have not parted yet share it. None where no atom could be
    placed any more."""
    states = [np.asarray(start, np.int32).reshape(-1, 2) for start in starts]
    rngs, lost = [key.rng() for key in keys], [False] * len(states)
    ratios = {}  # of each distinct state, by its bytes
    for state in states:
        if (name := state.tobytes()) not in ratios:
            ratio = ratios[name] = grid.empty.copy()
            for row, position in zip(state, grid.place(state), strict=True):
                grid.narrow(ratio, position, float(grid.radii[row[0]]))
    atoms = int(grid.counts.sum())
    while True:
        growing = [i for i, state in enumerate(states) if len(state) < atoms and not lost[i]]
        if not growing:
            return [None if gone else state for state, gone in zip(states, lost, strict=True)]
        names = [states[i].tobytes() for i in growing]
        distinct = {name: states[i] for name, i in zip(names, growing, strict=True)}
        allowed = {}
        for name, state in distinct.items():
            used = np.bincount(state[:, 0], minlength=len(grid.species))
            allowed[name] = grid.allowed(ratios[name], used, first=len(state) == 0)
        values = {}
        if policy.asks and (alive := [name for name in distinct if allowed[name].any()]):
            asked = [np.concatenate([grid.template, distinct[name]]) for name in alive]
            maps = q_maps(asked, [allowed[name] for name in alive])
            values = {name: q.reshape(-1) for name, q in zip(alive, maps, strict=True)}
        before, ratios = ratios, {}
        for i, name in zip(growing, names, strict=True):
            if not allowed[name].any():
                lost[i] = True
                continue
            q = values[name] if policy.asks else np.zeros(0)
            species, voxel = divmod(policy.choose(q, allowed[name].ravel(), atoms, rngs[i]), grid.voxels)
            row = np.array([[species, voxel]], np.int32)
            states[i] = np.concatenate([states[i], row])
            if (grown := states[i].tobytes()) not in ratios:
                ratio = ratios[grown] = before[name].copy()
                grid.narrow(ratio, grid.place(row)[0], float(grid.radii[species]))


def _batch(problem: Problem, grid: Grid, builds: Sequence[Array], **columns: Any) -> Batch:
    """Structures of complete builds; the column `order` says which placed atom came when. On a plane atoms keep
    their height when relaxed."""
    before = 0 if problem.template is None else problem.template.atoms
    positions = np.zeros((len(builds), len(problem.numbers), 3))
    if problem.template is not None:
        positions[:, :before] = problem.template.positions
    orders = np.zeros((len(builds), int(grid.counts.sum())), np.int32)
    kinds = np.searchsorted(grid.species, problem.placed_numbers)
    for i, rows in enumerate(builds):
        slots = np.zeros(len(rows), np.int32)  # which placed atom each row becomes: the next of its species
        for s in range(len(grid.species)):
            slots[rows[:, 0] == s] = np.flatnonzero(kinds == s)
        positions[i, before + slots] = grid.place(rows)
        orders[i] = slots
    batch = problem.batch(positions, order=orders, **columns)
    fixed = batch.fixed.reshape(len(batch), -1, 3).copy()
    fixed[:, before:, 2] |= grid.flat[kinds]
    return replace(batch, fixed=fixed.reshape(-1, 3))


def _rows(grid: Grid, structure: Batch) -> Array:
    """The snapped rows (k, 2) of one structure's placed atoms in order of placement."""
    template = grid.problem.template
    before = 0 if template is None else template.atoms
    order = structure.columns.get("order")
    return grid.snap(
        structure.positions[before:], structure.numbers[before:], None if order is None else order[0].tolist()
    )


@dataclass(frozen=True)
class Build:
    """New structures, atom by atom, by the policy of a trained agent.

    Parameters
    ----------
    count : int or {iteration: int}
        How many.
    grid : GridSettings
    policy : Policy
    model : str
        Name of the `Agent` in `Search(models={...})`.
    novel : bool
        A build that equals one that the agent has learned is begun anew, up to five times (costs no evaluation); without
        an agent (a uniform policy) nothing is known.
    """

    count: Schedule[int] = 1
    _: KW_ONLY
    grid: GridSettings = field(default_factory=GridSettings)
    policy: Policy = field(default_factory=Policy)
    model: str = "agent"
    novel: bool = True
    name: str = "Build"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        grid = self.grid.of(ctx.problem)
        starts = [np.zeros((0, 2), np.int32)] * scheduled(self.count, ctx.iteration)
        every = _built(grid, ctx, self.model, self.policy, starts, self.novel)
        builds = [rows for rows in every if rows is not None]
        return _batch(ctx.problem, grid, builds, parent=-1) if builds else Batch.empty()


@dataclass(frozen=True)
class Rebuild:
    """Members of the sample with one atom and its nearest neighbours taken out and built anew (thesis 5.3).

    Parameters
    ----------
    count : int or {iteration: int}
    least, most : int
        So many atoms are taken out, drawn evenly (thesis: 4 to 7).
    others : see `Build`
    """

    count: Schedule[int] = 1
    _: KW_ONLY
    least: int = 4
    most: int = 7
    grid: GridSettings = field(default_factory=GridSettings)
    policy: Policy = field(default_factory=Policy)
    model: str = "agent"
    novel: bool = True
    name: str = "Rebuild"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")
        if not 1 <= self.least <= self.most:
            raise ConfigurationError(
                f"{self.name} takes out 1 <= least <= most atoms, got {self.least} and {self.most}"
            )

    def __call__(self, ctx: Context) -> Batch:
        count = scheduled(self.count, ctx.iteration)
        if not count or not len(ctx.sample):
            return Batch.empty()
        grid = self.grid.of(ctx.problem)
        rng = ctx.key.fold("parents").rng()
        parents, starts = [], []
        for _ in range(count):
            parent = int(rng.integers(len(ctx.sample)))
            rows = _rows(grid, ctx.sample[parent])
            taken = min(len(rows), int(rng.integers(self.least, self.most + 1)))
            positions = grid.place(rows)
            away = grid.distances(positions, positions[rng.integers(len(rows))])
            out = np.argsort(away, kind="stable")[:taken]
            starts.append(np.delete(rows, out, axis=0))
            parents.append(parent)
        known = ctx.sample.columns.get("row", np.full(len(ctx.sample), -1))
        builds = _built(grid, ctx, self.model, self.policy, starts, self.novel)
        good = [i for i, rows in enumerate(builds) if rows is not None]
        if not good:
            return Batch.empty()
        return _batch(ctx.problem, grid, [builds[i] for i in good], parent=known[np.array(parents)[good]])


def _built(grid: Grid, ctx: Context, model: str, policy: Policy, starts: Sequence[Array], novel: bool) -> list[Any]:
    """What became of each start; None for one that was given up."""
    agent = ctx.models.get(model)
    if policy.asks and agent is None:
        raise ConfigurationError(
            f"a policy that asks for Q needs the agent '{model}' among the models of the search: models={{'{model}': "
            f"Agent(...)}}.{nearest(model, ctx.models)}"
        )
    q_maps: QMaps = agent.q_maps if agent is not None else lambda states, allowed: []
    keys = [ctx.key.fold("build", i) for i in range(len(starts))]
    one_by_one = policy.asks and agent is not None and agent.one_by_one
    seen: dict[bytes, Array] = {}  # Q where it is allowed, of states that builds share before they part

    def remembered(states: Sequence[Array], allowed: Sequence[Array]) -> list[Array]:
        maps = []
        for state, mask in zip(states, allowed, strict=True):
            if (name := state.tobytes()) not in seen:
                seen[name] = q_maps([state], [mask])[0][mask]
            q = np.zeros(mask.shape, np.float32)
            q[mask] = seen[name]
            maps.append(q)
        return maps

    def built(starts: Sequence[Array], keys: Sequence[Key]) -> list[Array | None]:
        if not one_by_one:
            return build(grid, q_maps, policy, starts, keys)
        return [build(grid, remembered, policy, [start], [key])[0] for start, key in zip(starts, keys, strict=True)]

    builds = built(starts, keys)
    if novel and agent is not None:
        for attempt in range(5):
            again = [i for i, rows in enumerate(builds) if rows is not None and agent.knows(rows)]
            if not again:
                break
            fresh = built([starts[i] for i in again], [keys[i].fold(attempt) for i in again])
            for i, rows in zip(again, fresh, strict=True):
                builds[i] = rows
    return builds


@dataclass(frozen=True)
class Snap:
    """Moves each placed atom to the nearest grid point, in order of placement and without collisions (ASLA-P): what is
    evaluated is then a structure that the agent could have built."""

    grid: GridSettings = field(default_factory=GridSettings)
    name: str = "Snap"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        if not len(batch):
            return batch
        grid, before = self.grid.of(ctx.problem), 0 if ctx.problem.template is None else ctx.problem.template.atoms
        positions = batch.positions.copy()
        for i in range(len(batch)):
            one, first = batch[i], int(batch.offsets[i]) + before
            order = one.columns["order"][0] if "order" in one.columns else np.arange(one.atoms - before)
            positions[first + order] = grid.place(_rows(grid, one))
        return batch.with_positions(positions)


# ---- learning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agent:
    """Q-learning from every evaluated structure; needs PyTorch (`pip install 'thalweg[asla]'`).

    Each told iteration is an episode: its lowest structure, snapped to the grid, gives one state-action pair per placed
    atom. After each episode the network takes `steps` training steps on the pairs of the best, the newest and `replay`
    random episodes, each pair rotated or mirrored at random. The published agent (Papers II, III) has lr=1e-3, warm_up=0,
    steps=1, patience=0, lifetime=0.

    Parameters
    ----------
    grid : GridSettings
    representation : "one-hot", "gaussian", "agr", "displaced" or "harmonics"
        See `thalweg.networks`; `representation_options` go to it.
    network : str
        A preset of `thalweg.networks.PRESETS`; None: "thesis-2d" or "thesis-3d-dilated-2".
    span : float or None
        Of the rewards [eV]; None: one and a half times as far as the median of the last 100 episodes lies above the best,
        at least 1 eV.
    lr : float
        Learning rate of Adam.
    warm_up : int
        Over so many training steps the learning rate rises to `lr`.
    steps : int
        Training steps per episode, each on other random episodes.
    replay : int
        Random episodes per training step.
    favour : float
        How much more often low episodes are replayed: with weights rank^-favour, rank 1 the lowest. 0: all alike.
    patience : int
        After so many episodes without a new lowest energy the agent begins anew: other initial weights, and rewards and
        replay know later episodes only. A pattern that was learned early, such as a square lattice, is seldom left
        otherwise. 0: never.
    lifetime : int
        It begins anew, too, after `lifetime` times 1, 1, 2, 1, 1, 2, 4, ... episodes, whatever it found: an agent finds the
        minimum soon or hardly ever (universal sequence of Luby, Sinclair, Zuckerman, Inf. Process. Lett. 47, 173 (1993)).
        0: never.
    symmetry : bool or None
        Random copies rotated and mirrored; None: unless a template has atoms beyond the grid.
    backend : "auto", "core" or "torch", see `thalweg.networks.Trainer`
    transfer_from : str, optional
        A snapshot (.npz) of an agent for the same species, representation and spacing (to a tenth): its weights are
        where the first life starts. A run leaves one per restart (`restarts/000/agent.npz`, of the life it ended in:
        train with patience=0, lifetime=0 for one that has learned all along); `FittedAgent.save` writes one.
    threads : int
        Of training and Q-maps in the compiled core; 0: as many as there are cores. Results do not depend on it.
    snapshot_every : int
        Episodes between the snapshots of weights and optimiser that the store holds; a resumed search repeats the
        training since the last one.
    seed : int
        Of initial weights and replay.
    """

    grid: GridSettings = field(default_factory=GridSettings)
    _: KW_ONLY
    representation: str = "gaussian"
    representation_options: Mapping[str, Any] = field(default_factory=dict)
    network: str | None = None
    span: float | None = None
    lr: float = 2e-3
    warm_up: int = 100
    steps: int = 3
    replay: int = 3
    favour: float = 0.0
    patience: int = 100
    lifetime: int = 300
    symmetry: bool | None = None
    backend: str = "auto"
    transfer_from: str | None = None
    threads: int = field(default=1, repr=False)
    snapshot_every: int = 50
    seed: int = 0
    name: str = field(default="agent", repr=False)
    built_on: Grid | None = field(default=None, repr=False, compare=False)  # of the search's problem

    def __post_init__(self) -> None:
        if self.representation not in REPRESENTATIONS:
            raise ConfigurationError(
                f"representation must be one of {', '.join(map(repr, REPRESENTATIONS))}, got {self.representation!r}."
                f"{nearest(str(self.representation), REPRESENTATIONS)}"
            )
        if self.span is not None and not 0 < self.span < np.inf:
            raise ConfigurationError(f"the span of the rewards must be a number above 0 eV, got {self.span!r}")
        if not self.favour >= 0:
            raise ConfigurationError(f"favour of an agent must be at least 0, got {self.favour!r}")
        for name, least in (
            ("replay", 0), ("patience", 0), ("lifetime", 0), ("warm_up", 0), ("steps", 1), ("snapshot_every", 1),
            ("threads", 0),
        ):  # fmt: skip
            check_whole(getattr(self, name), f"{name} of an agent", least)
        if not 0 < self.lr < np.inf:
            raise ConfigurationError(f"the learning rate lr must be a number above 0, got {self.lr!r}")

    def bound(self, problem: Problem) -> Agent:
        """The same agent, knowing its problem; a search calls it. Raises ConfigurationError if no network can be made."""
        agent = replace(self, built_on=self.grid.of(problem))
        agent.trainer()
        return agent

    def fit(self, data: Batch, previous: FittedAgent | None = None, *, key: Any = None) -> FittedAgent:
        """Learns the episodes that `previous` has not seen."""
        fitted = previous or FittedAgent(self)
        fitted.learn(data)
        return fitted

    def restore(self, data: Batch, state: Mapping[str, Array]) -> FittedAgent:
        """The agent of this state, bit for bit: the last snapshot, and the training since repeated."""
        fitted = FittedAgent(self)
        fitted.load(data, state)
        return fitted

    def trainer(self, life: int = 0) -> Any:
        """A new network and its optimiser; `life` counts how often the agent began anew."""
        from thalweg import networks

        network, grid = self._network(life), self._grid
        trainer = networks.Trainer(
            network, grid.shape, grid.periodic, lr=self.lr, backend=self.backend, threads=self.threads
        )
        if self.transfer_from is not None and life == 0:
            _start_from(trainer, self.transfer_from, self.signature)
        return trainer

    @property
    def _grid(self) -> Grid:
        if self.built_on is None:
            raise ConfigurationError("an Agent learns in a search: Search(models={'agent': Agent(...)})")
        return self.built_on

    def _network(self, life: int) -> Any:
        from thalweg import networks

        grid = self._grid
        kinds = {
            "one-hot": networks.OneHot, "gaussian": networks.Gaussian, "agr": networks.AGR,
            "displaced": networks.DisplacedGaussians, "harmonics": networks.CircularHarmonics,
        }  # fmt: skip
        kind, seed = kinds[self.representation], self.seed if life == 0 else Key.of(self.seed).fold("life", life).value
        known = [name for name in inspect.signature(kind).parameters if name not in ("species", "dimension")]
        if unknown := [name for name in self.representation_options if name not in known]:
            raise ConfigurationError(
                f"representation_options: '{self.representation}' takes {', '.join(known) or 'none'}, got "
                f"{unknown[0]!r}.{nearest(unknown[0], known)}"
            )
        own = {"seed": seed, "spacing": grid.spacing, "lattice": grid.lattice}
        options = {name: value for name, value in own.items() if name in known} | dict(self.representation_options)
        try:
            image = kind(len(grid.species), grid.dimension, **options)
        except ConfigurationError:
            raise
        except (TypeError, ValueError) as problem:
            raise ConfigurationError(
                f"representation_options: '{self.representation}' cannot be made of {dict(self.representation_options)} "
                f"({problem})"
            ) from problem
        fitting = [name for name, sizes in networks.PRESETS.items() if sizes["dimension"] == grid.dimension]
        name = self.network or ("thesis-2d" if grid.dimension == 2 else "thesis-3d-dilated-2")
        if name not in fitting:
            raise ConfigurationError(
                f"network must be one of {', '.join(map(repr, fitting))} on a grid of dimension {grid.dimension}, got "
                f"{name!r}.{nearest(name, fitting)}"
            )
        return networks.QNetwork.preset(name, image, seed=seed)

    @property
    def signature(self) -> dict[str, Array]:
        """What weights of this agent are for, and so what an agent must share that starts from them."""
        grid = self._grid
        return {
            "species": grid.species, "dimension": np.array(grid.dimension), "spacing": np.array(grid.spacing),
            "representation": np.array(self.representation),
            "options": np.array(repr(sorted(self.representation_options.items()))),
            "lattice": np.eye(grid.dimension) if grid.lattice is None else grid.lattice,
        }  # fmt: skip


class FittedAgent:
    """What an agent has learned. `losses`: one per episode."""

    def __init__(self, model: Agent):
        self.model = model
        self.trainer = model.trainer()
        self.grid: Any = model.built_on
        self.builds: list[Array] = []
        self.energies: list[float] = []
        self.losses: list[float] = []
        self._begin, self._lives = 0, 0  # the first episode of this life
        # The lowest energy of the episodes of this life that contain a state-action pair.
        self._best: dict[bytes, float] = {}
        self._known: set[bytes] = set()
        self._rows_seen = 0
        self._map: Any = None  # the network of now, compiled, and a state on it
        self._state: Any = None

    def __repr__(self) -> str:
        return f"FittedAgent({len(self.builds)} episodes, {self.trainer.network.convolution_weights} weights)"

    @property
    def size(self) -> int:
        """Episodes learned."""
        return len(self.builds)

    # ---- what builders ask ------------------------------------------------------------------------------
    def q_maps(self, states: Sequence[Array], allowed: Sequence[Array] | None = None) -> Sequence[Array]:
        """Q (S, V) float32 of each of n states (k, 2), template's atoms included; where `allowed` (S, V) is given and
        false, it may be missing (0)."""
        kinds = len(self.grid.species)
        if not self.trainer.network.representation.linear:  # its images are no sums over atoms: PyTorch has them
            return [self.trainer.q_map(state).reshape(kinds, -1) for state in states]
        if self._map is None:
            self._map = self._compiled()
        if allowed is not None and self.one_by_one:
            return [self._q_of(state, mask) for state, mask in zip(states, allowed, strict=True)]
        offsets = np.cumsum([0] + [len(state) for state in states])
        rows = np.concatenate(states)
        q = self._map.batch(offsets, rows[:, 0], rows[:, 1], threads=self.model.threads)
        return list(q.reshape(len(states), kinds, -1))

    @cached_property
    def one_by_one(self) -> bool:
        """Whether what an atom changes is had sooner than a whole map, as on large grids in space (in the plane the maps of
        builds side by side are sooner): builds then follow on one another atom by atom. The template's atoms are placed
        first, so they must not be many."""
        grid = self.grid
        if grid.dimension == 2 or not self.trainer.network.representation.linear:
            return False
        if len(grid.template) > grid.counts.sum():
            return False
        return bool(_core.QState(self._compiled()).method != "grid_fft")

    def _q_of(self, state: Array, allowed: Array) -> Array:
        """Q (S, V) of a state where it is allowed, from the state asked for before: atoms that differ are taken back."""
        if self._state is None:
            self._state = _core.QState(self._map)
        there = np.stack([self._state.species, self._state.voxels], axis=1)
        shorter = min(len(there), len(state))
        differs = np.any(there[:shorter] != state[:shorter], axis=1)
        same = int(np.argmax(differs)) if differs.any() else shorter
        for _ in range(len(there) - same):
            self._state.undo()
        for species, voxel in state[same:].tolist():
            self._state.place(species, voxel)
        q, voxels = np.zeros(allowed.shape, np.float32), np.flatnonzero(allowed.any(axis=0))
        q[:, voxels] = self._state.q(voxels)
        return q

    def _compiled(self) -> _core.QMap:
        """The network of now, in the compiled core."""
        arrays, kinds = self.trainer.weights(), len(self.grid.species)
        images = np.zeros((kinds, kinds, *arrays["kernels"].shape[1:]), np.float32)
        images[np.arange(kinds), np.arange(kinds)] = arrays["kernels"]
        layers = range(1, len(self.trainer.network.weights) + 1)
        network = _core.QNetwork(
            [arrays[f"w{layer}"] for layer in layers], [arrays[f"b{layer}"] for layer in layers],
            dilations=list(self.trainer.network.dilations), representation=images, representation_bias=arrays["shift"],
        )  # fmt: skip
        return _core.QMap(network, list(self.grid.shape), list(self.grid.periodic))

    def knows(self, rows: Array) -> bool:
        """Whether this complete build was learned."""
        return _canonical(rows) in self._known

    # ---- learning -----------------------------------------------------------------------------------------
    def learn(self, data: Batch, *, steps_from: int = 0) -> None:
        """Takes in the episodes of `data` not yet seen, one training step each from episode `steps_from` on."""
        for structure, energy in _episodes(data, self._rows_seen):
            begun = self._take_in(_rows(self.grid, structure), energy)
            if len(self.builds) > steps_from:
                if begun:
                    self.trainer = self.model.trainer(self._lives)
                self._train()
        self._rows_seen = len(data)

    def _take_in(self, rows: Array, energy: float) -> bool:
        """One more episode; whether a new life of the agent begins with it."""
        newest, model = len(self.builds), self.model
        stands_still = bool(newest) and newest - self._lowest() > model.patience > 0
        anew = stands_still or newest - self._begin >= model.lifetime * _luby(self._lives + 1) > 0
        if anew:
            self._begin, self._lives = newest, self._lives + 1
            self._best.clear()
        self.builds.append(rows)
        self.energies.append(energy)
        self._known.add(_canonical(rows))
        for key in _pairs(rows):
            self._best[key] = min(energy, self._best.get(key, np.inf))
        return anew

    def _lowest(self) -> int:
        """The episode of this life with the lowest energy, the first of equals."""
        return self._begin + int(np.argmin(self.energies[self._begin :]))

    def _train(self) -> None:
        self._map = self._state = None
        newest, model = len(self.builds) - 1, self.model
        rng = Key.of(model.seed).fold("replay", newest).rng()
        energies = np.array(self.energies)
        best = self._lowest()
        others = np.setdiff1d(np.arange(self._begin, newest), [best])
        weights = (1.0 + np.argsort(np.argsort(energies[others], kind="stable"))) ** -model.favour
        for step in range(model.steps):
            drawn = rng.choice(
                others, min(model.replay, len(others)), replace=False,
                p=weights / weights.sum() if model.favour and len(others) else None,
            )  # fmt: skip
            if model.warm_up:
                self.trainer.lr = model.lr * min(1.0, (self.trainer.updates + 1) / model.warm_up)
            loss = self._train_on([best, newest, *drawn.tolist()], rng)
            if step == 0:
                self.losses.append(loss)

    def _train_on(self, chosen: Sequence[int], rng: np.random.Generator) -> float:
        """One training step on these episodes; the loss before it."""
        turn = self.model.symmetry
        if turn is None:
            turn = self.grid.alone
        ways = len(self.grid.symmetries) if turn else 0
        placed, offsets, actions, targets, turns = [], [0], [], [], []
        scale = self._scale()
        for episode in dict.fromkeys(chosen):
            rows = self.builds[episode]
            for step, key in enumerate(_pairs(rows)):
                state = np.concatenate([self.grid.template, rows[:step]])
                if ways:
                    turns.append(int(rng.integers(ways)))
                placed.append(state)
                offsets.append(offsets[-1] + len(state))
                actions.append(rows[step])
                targets.append(self.reward(self._best[key], scale))
        states, chosen_rows = np.concatenate(placed).astype(np.int32), np.array(actions, np.int32)
        if ways:
            states[:, 1] = self.grid.turned(states[:, 1], np.repeat(turns, np.diff(offsets)))
            chosen_rows[:, 1] = self.grid.turned(chosen_rows[:, 1], np.array(turns))
        loss, _ = self.trainer.step(states, np.array(offsets, np.int64), chosen_rows, np.array(targets, np.float32))
        return float(loss)

    def reward(self, energy: float, scale: tuple[float, float] | None = None) -> float:
        """1 for the best energy so far, falling to -1 at `span` above it; -1 for what failed."""
        best, span = scale or self._scale()
        if not np.isfinite(energy) or not np.isfinite(best):
            return -1.0
        return max(-1.0, 1.0 - 2.0 * (energy - best) / span)

    def _scale(self) -> tuple[float, float]:
        """The best energy and the span of the rewards [eV]."""
        best, recent = self.energies[self._lowest()], np.array(self.energies[self._begin :][-100:])
        recent = recent[np.isfinite(recent)]
        if self.model.span is not None or not len(recent):
            return best, self.model.span or 1.0
        return best, max(1.0, 1.5 * (float(np.median(recent)) - best))

    # ---- keeping --------------------------------------------------------------------------------------------
    @property
    def state(self) -> dict[str, Array]:
        """For the store: at every `snapshot_every`-th episode the weights and the optimiser, else how many episodes."""
        episodes = np.array(len(self.builds))
        if len(self.builds) % self.model.snapshot_every:
            return {"episodes": episodes, "partial": np.array(1)}
        arrays = {f"trainer.{name}": values for name, values in self.trainer.state_dict().items()}
        return {"episodes": episodes, "snapshot": episodes, "losses": np.array(self.losses), **arrays}

    def load(self, data: Batch, state: Mapping[str, Array]) -> None:
        """See `Agent.restore`. `state`: a snapshot, and how many episodes there were when it was to be continued."""
        self._map = self._state = None
        if "snapshot" in state:
            inner = {name[8:]: values for name, values in state.items() if name.startswith("trainer.")}
            self.trainer.load_state_dict(inner)
            self.losses = np.asarray(state["losses"], float).tolist()
        self.learn(data, steps_from=int(state.get("snapshot", 0)))

    def portrait(self, panels: int = 9) -> dict[str, Array]:
        """What a report draws of it: `losses` (episodes,); of the best build so far, as seen now, `q` (n, S, nx, ny) at n
        of its steps (in three dimensions the largest along the third), `allowed` likewise (bool), `steps` (n,) how many
        atoms there are; `placed` (k, 3) rows species, x, y in order of placement, `template` likewise; `plane` (2, 2) the
        steps along x and y in their plane [angstrom]; `species` (S,)."""
        if not self.builds or not np.isfinite(min(self.energies)):
            return {"losses": np.array(self.losses)}
        grid, rows = self.grid, self.builds[int(np.argmin(self.energies))]
        steps = np.unique(np.linspace(0, len(rows) - 1, panels).astype(int))
        q = np.array(self.q_maps([np.concatenate([grid.template, rows[:k]]) for k in steps]))
        allowed, ratio, used = [], grid.empty.copy(), np.zeros(len(grid.species), int)
        for k, row in enumerate(rows):
            if k in steps:
                allowed.append(grid.allowed(ratio, used, first=k == 0))
            grid.narrow(ratio, grid.place(row[None])[0], float(grid.radii[row[0]]))
            used[row[0]] += 1
        shape = (len(steps), len(grid.species), *grid.shape)
        masks = np.array(allowed).reshape(shape)
        maps = np.where(masks, q.reshape(shape), -np.inf)
        if grid.dimension == 3:
            maps, masks = maps.max(axis=-1), masks.max(axis=-1)
        flat = [np.column_stack([r[:, 0], *np.unravel_index(r[:, 1], grid.shape)[:2]]) for r in (rows, grid.template)]
        return {
            "losses": np.array(self.losses), "q": np.where(masks, maps, 0).astype(np.float32), "allowed": masks,
            "steps": steps, "placed": flat[0], "template": flat[1],
            "plane": np.linalg.cholesky(grid.steps @ grid.steps.T)[:2, :2], "species": grid.species,
        }  # fmt: skip

    def save(self, file: Any) -> None:
        """Weights, optimiser and what they are for as .npz, for `transfer_from`; file: a path or an open file."""
        arrays: dict[str, Any] = {f"agent.{name}": value for name, value in self.model.signature.items()}
        np.savez_compressed(file, **arrays, **self.trainer.state_dict())


def _start_from(trainer: Any, path: str, signature: Mapping[str, Array]) -> None:
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as problem:
        raise ConfigurationError(f"transfer_from: {path} is no snapshot of an agent ({problem})") from problem
    if missing := [name for name in signature if f"agent.{name}" not in state]:
        raise ConfigurationError(
            f"transfer_from: {path} is no snapshot of an agent (it does not say its {missing[0]}); a run leaves one in "
            "restarts/000/agent.npz, FittedAgent.save writes one"
        )
    for name, mine in signature.items():
        other = state.pop(f"agent.{name}")
        alike = mine.shape == other.shape and mine.dtype.kind == other.dtype.kind and (
            np.allclose(mine, other, 0.1, 0.1) if name in ("spacing", "lattice") else np.array_equal(mine, other)
        )  # fmt: skip
        if not alike:
            raise ConfigurationError(
                f"transfer_from: {path} is of an agent whose {name} is {other.tolist()}, this one's is {mine.tolist()}"
            )
    fresh = trainer.state_dict()
    for name in ("first_moment", "second_moment", "updates"):  # learning starts anew, from other weights
        state[name] = fresh[name]
    try:
        trainer.load_state_dict(state)
    except ConfigurationError as problem:
        raise ConfigurationError(f"transfer_from: {path}: {problem}") from None


def _episodes(data: Batch, begin: int) -> list[tuple[Batch, float]]:
    """The lowest structure of each iteration from row `begin` on, and its energy; infinity for one that failed."""
    if begin >= len(data):
        return []
    energy = np.where(data.ok, data.columns["energy"], np.inf)[begin:]
    tickets = data.columns["ticket"][begin:]
    kinds = data.columns.get("candidate", np.zeros(len(data), np.int64))[begin:]
    found = []
    for ticket, candidate in dict.fromkeys(zip(tickets.tolist(), kinds.tolist(), strict=True)):
        rows = np.flatnonzero((tickets == ticket) & (kinds == candidate))
        lowest = int(rows[np.argmin(energy[rows])])
        found.append((data[begin + lowest], float(energy[lowest])))
    return found


def _luby(k: int) -> int:
    """The k-th, from 1 on, of 1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8, ..."""
    while k & (k + 1):
        k -= (1 << (k.bit_length() - 1)) - 1
    return (k + 1) >> 1


def _canonical(rows: Array) -> bytes:
    """The same bytes for the same atoms in any order."""
    return rows[np.lexsort((rows[:, 0], rows[:, 1]))].tobytes()


def _pairs(rows: Array) -> list[bytes]:
    """One key per state-action pair of a build; equal for equal pairs."""
    return [_canonical(rows[:step]) + b"|" + rows[step].tobytes() for step in range(len(rows))]
