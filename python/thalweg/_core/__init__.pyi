"""
Compiled core of thalweg. Use the Python package; nothing here checks more than shapes and types.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing

from . import cuda as cuda

__all__: list[str] = [
    "ComplementaryEnergy",
    "Emt",
    "Environments",
    "Fchl19",
    "Fingerprint",
    "Gpr",
    "Kernel",
    "Landscape",
    "LennardJones",
    "LocalDensity",
    "LocalGpr",
    "LocalSurrogate",
    "ManyBodyPrior",
    "Minimiser",
    "PairPrior",
    "PythonLandscape",
    "QDelta",
    "QMap",
    "QNetwork",
    "QState",
    "QTraining",
    "SmoothCarbon",
    "Soap",
    "Surrogate",
    "Tersoff",
    "TightBinding",
    "Tilted",
    "active_isa",
    "adam_step",
    "closest_contacts",
    "covalent_radius",
    "cuda",
    "default_threads",
    "evaluate",
    "force_isa",
    "fragments",
    "image_statistics",
    "neighbor_pairs",
    "permute",
    "q_receptive_radius",
    "q_weight_count",
    "random_structures",
    "rattle",
    "relax",
]

class Landscape:
    """
    Anything that gives structures energies [eV] and forces [eV/angstrom, -dE/dx].
    """

class ComplementaryEnergy(Landscape):
    """
    Complementary energy (Chiriki, Christiansen, Hammer 2019): the sum over atoms with an attractor of sqrt(|f - A|^2 + softening^2) - softening, f the local density. attractors (m, size): features that each atom of the batch should come to have, its own atomic number last; a row of NaN: the atom does not count. In the unit of the features.
    """
    def __init__(
        self,
        density: LocalDensity,
        attractors: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        *,
        softening: float = 0.01,
    ) -> None: ...

class Emt(Landscape):
    """
    Effective medium theory (Jacobsen, Stoltze, Norskov 1996); values of ASE's EMT() for Al, Cu, Ag, Au, Ni, Pd, Pt, H, C, N and O.
    """
    def __init__(self) -> None: ...
    def __repr__(self) -> str: ...

class SmoothCarbon(Landscape):
    def __init__(
        self,
        *,
        depth: float = 3.0,
        stiffness: float = 2.0,
        r0: float = 1.45,
        angle: float = 2.0,
        inner: float = 1.8,
        outer: float = 2.5,
    ) -> None: ...

class LennardJones(Landscape):
    """
    Lennard-Jones, all species alike; values of ASE's calculator. sigma, rc, ro in angstrom, epsilon in eV; rc = 0: 3 sigma, ro = 0: 0.66 rc.
    """
    def __init__(
        self,
        sigma: float = 1.0,
        epsilon: float = 1.0,
        *,
        rc: float = 0.0,
        ro: float = 0.0,
        smooth: bool = False,
    ) -> None: ...
    def __repr__(self) -> str: ...

class TightBinding(Landscape):
    """
    Tight binding of the valence electrons of free molecules: {(number, number): (couplings ss, sp, pp sigma, pp pi [eV] at r0, r0 [angstrom], stiffness = q, repulsion [eV], ratio = p / q)} for every pair of species, and levels {number: (s, p)} [eV] for every species; potentials.hpp has the formula.
    """
    def __init__(
        self,
        pairs: collections.abc.Mapping[tuple[int, int], collections.abc.Sequence[float]],
        levels: collections.abc.Mapping[int, collections.abc.Sequence[float]],
    ) -> None: ...
    @property
    def pairs(self) -> dict[tuple[int, int], tuple[float, ...]]:
        """
        As given, in rising order.
        """
    @property
    def levels(self) -> dict[int, tuple[float, float]]:
        """
        {number: (s, p)} [eV], in rising order.
        """
    @staticmethod
    def free_atom(number: int) -> tuple[float, float]:
        """
        Levels (s, p) [eV] of a free atom; an error for an element that is not covered.
        """
    @staticmethod
    def elements() -> list[int]:
        """
        Atomic numbers that `free_atom` covers.
        """
    def __repr__(self) -> str: ...

class Tilted(Landscape):
    """
    Another landscape plus a linear function of the positions, shift . x, for batches of as many atoms as shift (m, 3) [eV/angstrom] has rows: makes the forces of a surrogate right at one point.
    """
    def __init__(self, landscape: Landscape, shift: numpy.typing.ArrayLike) -> None: ...

class ManyBodyPrior(Landscape):
    """
    Wells with numbers of their own for every pair of species, {(number, number): (depth [eV], r0 [angstrom], stiffness = q, ratio = p / q)}, and an exponent for every species, {number: g}: 1 gives pair wells (Morse wells with ratio 2), 1/2 the second-moment form of metals (Cleri, Rosato, PRB 48, 22 (1993)); potentials.hpp has the formula.
    """
    def __init__(
        self,
        pairs: collections.abc.Mapping[tuple[int, int], collections.abc.Sequence[float]],
        exponents: collections.abc.Mapping[int, float],
    ) -> None: ...
    @property
    def pairs(self) -> dict[tuple[int, int], tuple[float, float, float, float]]:
        """
        {(number, number): (depth, r0, stiffness, ratio)}, in rising order.
        """
    @property
    def exponents(self) -> dict[int, float]:
        """
        {number: exponent}, in rising order.
        """

class Tersoff(Landscape):
    """
    Tersoff's bond-order potential: {(number, number, number): (m, gamma, lambda3, c, d, h, n, beta, lambda2, B, R, D, lambda1, A)} as in LAMMPS' files, or the name of a published set; eV, angstrom.
    """
    @typing.overload
    def __init__(
        self, entries: collections.abc.Mapping[tuple[int, int, int], collections.abc.Sequence[float]]
    ) -> None: ...
    @typing.overload
    def __init__(self, name: str) -> None: ...
    @property
    def entries(self) -> dict[tuple[int, int, int], tuple[float, ...]]:
        """
        {(number, number, number): (m, gamma, lambda3, c, d, h, n, beta, lambda2, B, R, D, lambda1, A)}, in rising order.
        """
    @staticmethod
    def names() -> list[str]:
        """
        Names of the published sets.
        """
    def __repr__(self) -> str: ...

class PairPrior(Landscape):
    """
    Pair potential from covalent radii alone. form: 'bonding' (Morse wells at the sum of radii: depth [eV], stiffness [1/r0]) or 'repulsive' (1 / (r + 1 - r_min)^12, r_min = repulsive_factor times the sum of radii). cutoff [angstrom] = 0: 2.5 times the sum of radii of each pair (bonding), 3 (repulsive).
    """
    def __init__(
        self,
        form: str = "bonding",
        *,
        depth: float = 0.8,
        stiffness: float = 4.0,
        radius_scale: float = 1.0,
        cutoff: float = 0.0,
        repulsive_factor: float = 0.7,
        sharp_cutoff: bool = False,
    ) -> None: ...
    def __repr__(self) -> str: ...

class PythonLandscape(Landscape):
    """
    A landscape whose numbers come from function(numbers (n,), positions (n, 3), cell (3, 3), pbc (3,)) -> (energy [eV], forces (n, 3) [eV/angstrom]), called for one structure at a time whatever the number of threads; what raises or is not finite gives NaN for that structure alone. text: its repr.
    """
    def __init__(
        self,
        function: collections.abc.Callable[..., tuple[float, numpy.typing.NDArray[numpy.float64]]],
        text: str = "PythonLandscape()",
    ) -> None: ...
    def __repr__(self) -> str: ...

class Fingerprint:
    """
    Fingerprint of Oganov and Valle for structures of one composition; see thalweg.descriptors.
    """
    def __init__(
        self,
        numbers: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        periodic: bool,
        *,
        cutoff_radial: float = 6.0,
        cutoff_angular: float = 4.0,
        bin_width: float = 0.2,
        angular_bins: int = 30,
        sigma_radial: float = 0.2,
        sigma_angular: float = 0.2,
        gamma: float = 2.0,
        eta: float = 20.0,
        n_sigma: float = 4.0,
        angular: bool = True,
        convention: str = "smooth",
    ) -> None: ...
    def contract(
        self,
        batch: typing.Any,
        weights: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        threads: int = 0,
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        d(weights . features)/dx (m, 3) for weights (n, size), without the Jacobian.
        """
    def jacobian(self, batch: typing.Any, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
        """
        Derivatives of the features with respect to the positions (m, 3, size), 1/angstrom.
        """
    def values(self, batch: typing.Any, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
        """
        Features (n, size).
        """
    @property
    def size(self) -> int:
        """
        Length of the feature vector.
        """

class Fchl19:
    """
    FCHL19 of each atom; see thalweg.descriptors.
    """
    def __init__(
        self,
        species: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        *,
        cutoff_pairs: float = 8.0,
        cutoff_triplets: float = 8.0,
        n_pairs: int = 24,
        n_triplets: int = 20,
        n_fourier: int = 1,
        eta_pairs: float = 0.32,
        eta_triplets: float = 2.7,
        zeta: float = 3.141592653589793,
        decay_pairs: float = 1.8,
        decay_triplets: float = 0.57,
        weight_triplets: float = 13.4,
    ) -> None: ...
    def contract(
        self,
        batch: typing.Any,
        weights: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        threads: int = 0,
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        d(weights . features)/dx (m, 3) for weights (rows, size), without the Jacobian.
        """
    def jacobian(self, batch: typing.Any, threads: int = 0) -> list:
        """
        Of each structure d(features of its atoms)/d(positions of its atoms) (n, n, 3, size), 1/angstrom.
        """
    def values(self, batch: typing.Any, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
        """
        Features (rows, size).
        """
    @property
    def size(self) -> int:
        """
        Features of one row.
        """

class LocalDensity:
    """
    Local density feature of each atom; see thalweg.descriptors.
    """
    def __init__(
        self,
        species: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        *,
        decay: float = 1.0,
        cutoff: float = 11.9,
    ) -> None: ...
    def contract(
        self,
        batch: typing.Any,
        weights: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        threads: int = 0,
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        d(weights . features)/dx (m, 3) for weights (rows, size), without the Jacobian.
        """
    def jacobian(self, batch: typing.Any, threads: int = 0) -> list:
        """
        Of each structure d(features of its atoms)/d(positions of its atoms) (n, n, 3, size), 1/angstrom.
        """
    def values(self, batch: typing.Any, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
        """
        Features (rows, size).
        """
    @property
    def size(self) -> int:
        """
        Features of one row.
        """

class Soap:
    """
    SOAP power spectrum; see thalweg.descriptors.
    """
    def __init__(
        self,
        species: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        *,
        r_cut: float = 6.0,
        n_max: int = 6,
        l_max: int = 4,
        sigma: float = 0.5,
        cutoff: str = "smooth",
        average: str = "off",
    ) -> None: ...
    def contract(
        self,
        batch: typing.Any,
        weights: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        threads: int = 0,
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        d(weights . features)/dx (m, 3) for weights (rows, size), without the Jacobian.
        """
    def jacobian(self, batch: typing.Any, threads: int = 0) -> list:
        """
        Of each structure d(features of its atoms)/d(positions of its atoms) (n, n, 3, size), 1/angstrom.
        """
    def values(self, batch: typing.Any, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
        """
        Features (rows, size).
        """
    @property
    def size(self) -> int:
        """
        Features of one row.
        """
    @property
    def reach(self) -> float:
        """
        Distance up to which neighbours count, angstrom.
        """

class Kernel:
    """
    k(x, x') = amplitude [weight_long exp(-|x-x'|^2 / 2 length_long^2) + weight_short exp(-|x-x'|^2 / 2 length_short^2)] (thesis (2.17)); amplitude and noise (a variance, on the diagonal) in eV^2, lengths in units of the features.
    """
    def __init__(
        self,
        *,
        amplitude: float = 100.0,
        length_long: float = 10.0,
        length_short: float = 2.0,
        weight_long: float = 0.99,
        weight_short: float = 0.01,
        noise: float = 1e-05,
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def amplitude(self) -> float: ...
    @property
    def length_long(self) -> float: ...
    @property
    def length_short(self) -> float: ...
    @property
    def noise(self) -> float: ...
    @property
    def weight_long(self) -> float: ...
    @property
    def weight_short(self) -> float: ...

class Gpr:
    """
    Gaussian process regression on feature vectors (thesis (2.14)-(2.17)). Do not change one that a Surrogate uses: append to a copy().
    """
    def __init__(self, features: int, kernel: Kernel, *, noise_slope: float = 0.3) -> None: ...
    def append(
        self,
        feature: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        target: float,
        *,
        directions: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None = None,
        slopes: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None = None,
    ) -> None:
        """
        One more point (D,) in O(n^2) for each row; with its slopes (m,) along directions (m, D).
        """
    def copy(self) -> Gpr: ...
    def fit(
        self,
        features: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        targets: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        *,
        counts: typing.Annotated[numpy.typing.ArrayLike, numpy.int64] | None = None,
        directions: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None = None,
        slopes: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None = None,
        threads: int = 1,
    ) -> None:
        """
        Full factorisation of (n, D) features and (n,) targets [eV]; with counts (n,), directions (m, D) and slopes (m,) also of slopes = directions . gradient, counts[i] of them at point i.
        """
    def likelihood(self, kernel: Kernel) -> dict:
        """
        Log marginal likelihood (`value`) at other hyperparameters and its derivatives with respect to the logarithms of amplitude, length_long, length_short, noise and weight_short / weight_long (`weight`).
        """
    def optimise(
        self,
        *,
        bounds: dict = {},
        starts: collections.abc.Sequence[Kernel] = [],
        free: collections.abc.Sequence[str] = ["amplitude", "length_long", "length_short"],
        max_evaluations: int = 60,
    ) -> float:
        """
        Maximises the likelihood over the hyperparameters named in `free`, from the current kernel and from each of `starts`; refits with the best and returns its log likelihood. bounds: name -> (low, high).
        """
    def predict(
        self,
        features: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        *,
        kappa: float = 0.0,
        gradient: bool = False,
    ) -> tuple:
        """
        Of (count, D) features: mean (count,) and sigma (count,), with gradient=True also d(mean - kappa sigma)/df and d sigma/df (count, D).
        """
    def remove(self, row: int) -> None:
        """
        One point fewer in O(n^2); with slopes, a refit.
        """
    def set_kernel(self, kernel: Kernel) -> None:
        """
        New hyperparameters and a refit from the cached distances.
        """
    def set_targets(self, targets: typing.Annotated[numpy.typing.ArrayLike, numpy.float64]) -> None:
        """
        New targets (rows,) for the same points, O(n^2).
        """
    def whitened(
        self, features: typing.Annotated[numpy.typing.ArrayLike, numpy.float64]
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        L^-1 k (count, rows) of (count, D) features: the posterior covariance of two is their k minus the product of their rows.
        """
    @property
    def features(self) -> int: ...
    @property
    def jitter(self) -> float: ...
    @property
    def kernel(self) -> Kernel: ...
    @property
    def log_likelihood(self) -> float: ...
    @property
    def mean(self) -> float: ...
    @property
    def noise_slope(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def training(self) -> numpy.typing.NDArray[numpy.float64]: ...
    @property
    def weights(self) -> numpy.typing.NDArray[numpy.float64]: ...

class Environments:
    """
    Two- and three-body symmetry functions of every atom's surroundings (environments.hpp).
    """
    def __init__(
        self,
        species: collections.abc.Sequence[int],
        *,
        n_radial: int = 6,
        n_angular: int = 3,
        l_max: int = 3,
        radial_cutoff: float = 6.0,
        angular_cutoff: float = 5.0,
    ) -> None: ...
    def values(self, batch: typing.Any) -> numpy.typing.NDArray[numpy.float64]:
        """
        (m, D) features of every atom of a batch.
        """
    @property
    def size(self) -> int: ...

class LocalGpr:
    """
    Sparse GP over atomic environments, taught energies and forces (local_gpr.hpp). Do not change one that a LocalSurrogate uses: append to a copy().
    """
    def __init__(
        self,
        environments: Environments,
        *,
        noise_energy: float = 0.1,
        noise_force: float = 0.1,
        tolerance: float = 0.001,
        max_inducing: int = 400,
    ) -> None: ...
    def append(
        self,
        batch: typing.Any,
        energies: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        forces: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> None:
        """
        Learns more structures, one by one.
        """
    def copy(self) -> LocalGpr: ...
    def fit(
        self,
        batch: typing.Any,
        energies: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        forces: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        *,
        length: float = 1.5,
        amplitude: float = 1.0,
        noise_scale: float = 1.0,
    ) -> None:
        """
        Forgets everything and learns these structures: energies (n,), forces (m, 3; NaN: not known).
        """
    def optimise(self, factors: collections.abc.Sequence[float] = ...) -> float:
        """
        Maximises the marginal likelihood over the length (times each of `factors`), amplitude and noise scale; returns its logarithm.
        """
    @property
    def amplitude(self) -> float: ...
    @property
    def inducing(self) -> int: ...
    @property
    def length(self) -> float: ...
    @property
    def log_likelihood(self) -> float: ...
    @property
    def mean(self) -> float: ...
    @property
    def noise_scale(self) -> float: ...
    @property
    def scale(self) -> numpy.typing.NDArray[numpy.float64]: ...
    @property
    def size(self) -> int: ...
    @property
    def tolerance(self) -> float: ...

class LocalSurrogate(Landscape):
    """
    A LocalGpr as a landscape: prior + atom energies + mean - kappa sigma, with forces.
    """
    def __init__(
        self,
        gpr: LocalGpr,
        *,
        prior: Landscape | None = None,
        atom_energies: collections.abc.Mapping[int, float] = {},
        kappa: float = 0.0,
    ) -> None: ...
    def predict(self, batch: typing.Any, *, forces: bool = False, atoms: bool = False, threads: int = 0) -> tuple:
        """
        Energy (n,) and sigma (n,) [eV], with forces=True also -dE/dx and -d sigma/dx (m, 3), with atoms=True also sigma of each atom's energy (m,); kappa is not applied.
        """

class Surrogate(Landscape):
    """
    The GP as a landscape: prior + atom energies + mean - kappa sigma, with forces (thesis (2.18)).
    """
    def __init__(
        self,
        fingerprint: Fingerprint,
        gpr: Gpr,
        *,
        prior: Landscape | None = None,
        atom_energies: collections.abc.Mapping[int, float] = {},
        kappa: float = 0.0,
    ) -> None: ...
    def predict(self, batch: typing.Any, *, forces: bool = False, threads: int = 0) -> tuple:
        """
        Energy (n,) and sigma (n,) [eV], with forces=True also -dE/dx and -d sigma/dx (m, 3); kappa is not applied.
        """

class NeighborList:
    """
    Pairs of one structure that moves: they are looked for anew only when an atom has moved by more than skin / 2 [angstrom], or atoms, cell or pbc have changed.
    """
    def __init__(self, cutoff: float, skin: float = 0.5) -> None: ...
    def update(self, batch: typing.Any) -> tuple:
        """
        What `neighbor_pairs` gives, in new arrays.
        """

    @property
    def rebuilds(self) -> int:
        """
        How often pairs were looked for anew.
        """

class Minimiser:
    """
    The optimiser of one structure, driven from outside:

        m = Minimiser(positions, fixed, steps=100)
        while not m.done:
            m.tell(*energy_and_forces(m.positions))

    Energies in eV, forces = -dE/dx in eV/angstrom, positions in angstrom, all arrays (n, 3).
    """
    def __init__(
        self,
        positions: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        fixed: typing.Annotated[numpy.typing.ArrayLike, numpy.bool],
        *,
        steps: int = 100,
        force_tolerance: float = 0.05,
        max_step: float = 0.2,
        memory: int = 10,
        first_curvature: float = 70.0,
        box: typing.Any = None,
    ) -> None: ...
    def tell(self, energy: float, forces: typing.Annotated[numpy.typing.ArrayLike, numpy.float64]) -> None:
        """
        Energy [eV] and forces (n, 3) [eV/angstrom] at `positions`; moves `positions` on unless done.
        """
    @property
    def best_energy(self) -> float: ...
    @property
    def best_forces(self) -> numpy.typing.NDArray[numpy.float64]: ...
    @property
    def best_positions(self) -> numpy.typing.NDArray[numpy.float64]: ...
    @property
    def converged(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def positions(self) -> numpy.typing.NDArray[numpy.float64]: ...

class QTraining:
    """
    Q of state-action pairs and gradients of a Q-network for one shape (training.hpp).
    """
    def __init__(
        self,
        grid: collections.abc.Sequence[int],
        periodic: collections.abc.Sequence[bool],
        *,
        species: int,
        kernel: int,
        dilation: int,
        half_window: int,
        slope: float = 0.01,
    ) -> None: ...
    def evaluate(
        self,
        parameters: numpy.typing.ArrayLike,
        kernels: numpy.typing.ArrayLike,
        shift: numpy.typing.ArrayLike,
        placed: numpy.typing.ArrayLike,
        offsets: numpy.typing.ArrayLike,
        actions: numpy.typing.ArrayLike,
        *,
        threads: int = 1,
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Q (n,).
        """
    def gradient(
        self,
        parameters: numpy.typing.ArrayLike,
        kernels: numpy.typing.ArrayLike,
        shift: numpy.typing.ArrayLike,
        placed: numpy.typing.ArrayLike,
        offsets: numpy.typing.ArrayLike,
        actions: numpy.typing.ArrayLike,
        targets: numpy.typing.ArrayLike,
        *,
        image: bool = False,
        threads: int = 1,
    ) -> tuple:
        """
        Mean square loss, Q (n,), and its derivative by parameters and, with image=True, by kernels and shift (flat, else empty).
        """
    @property
    def parameters(self) -> int: ...

def adam_step(
    gradient: numpy.typing.ArrayLike,
    parameters: numpy.typing.NDArray[numpy.float32],
    first_moment: numpy.typing.NDArray[numpy.float32],
    second_moment: numpy.typing.NDArray[numpy.float32],
    *,
    update: int,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> None:
    """
    One step of Adam, in place; update = 1, 2, ...
    """

def image_statistics(
    grid: collections.abc.Sequence[int],
    periodic: collections.abc.Sequence[bool],
    kernels: numpy.typing.ArrayLike,
    placed: numpy.typing.ArrayLike,
    offsets: numpy.typing.ArrayLike,
) -> tuple[numpy.typing.NDArray[numpy.float64], numpy.typing.NDArray[numpy.float64]]:
    """
    Mean and variance (species,) of images (species, *window kernels) of whole grids.
    """

def active_isa() -> str: ...
def closest_contacts(batch: typing.Any, *, threads: int = 0) -> numpy.typing.NDArray[numpy.float64]:
    """
    Smallest distance over the sum of covalent radii of every structure (n,), images included.

    Pairs of atoms that are both fixed in all coordinates do not count; infinity where no pair is left.
    """

def covalent_radius(number: int) -> float: ...
def default_threads() -> int: ...
def evaluate(landscape: Landscape, batch: typing.Any, *, threads: int = 0) -> tuple:
    """
    Energies (n,) [eV] and forces (m, 3) [eV/angstrom] of a batch; threads = 0: default_threads(). The same bits for any number of threads.
    """

def force_isa(name: str) -> bool: ...
def fragments(batch: typing.Any, c2: float = 1.25, *, threads: int = 0) -> numpy.typing.NDArray[numpy.int32]:
    """
    Number of pieces of every structure (n,) that hang together by distances of at most c2 times the covalent sum.

    Images included; atoms fixed in all coordinates count as one piece.
    """

def neighbor_pairs(batch: typing.Any, cutoff: float) -> tuple:
    """
    Every pair (i, j, image) of one structure within the cutoff [angstrom], once: i (p,), j (p,), d (p, 3) = r_j + image - r_i, r (p,).
    """

def permute(batch: typing.Any, *, again: float = 0.3, key: typing.Any, first_row: int = 0, threads: int = 0) -> tuple:
    """
    Swap positions of random pairs of free atoms of different species in every parent.

    One swap, and each further one with probability `again`. Returns positions (m, 3) and ok (n,) bool: False where no such
    pair exists.
    """

def random_structures(
    numbers: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    cell: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    pbc: typing.Annotated[numpy.typing.ArrayLike, numpy.bool],
    template_positions: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    template_numbers: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    *,
    box: typing.Any,
    count: int,
    key: typing.Any,
    first_row: int = 0,
    c1: float = 0.75,
    c2: float = 1.25,
    tries_per_atom: int = 100,
    tries_per_structure: int = 20,
    threads: int = 0,
) -> tuple:
    """
    Random connected structures: atoms `numbers` (k,) placed in a box, on a template that may have no atoms.

    Each atom goes next to a random atom present: uniform direction, distance uniform in volume between c1 and c2 times the
    sum of covalent radii, inside the box, no atom or image closer than c1. box: (corner (3,), vectors (3, 3), open (3,)) in
    angstrom; key: (low, high) of the random stream, row i of the result draws from row first_row + i of it whatever count
    and threads are. Returns positions (count, t + k, 3), template first, and ok (count,) bool; rows that failed hold the
    template and the box's centre. Raises ConfigurationError if the box or cell is too small or the template overlaps itself.
    """

def rattle(
    batch: typing.Any,
    *,
    box: typing.Any,
    amplitude: float = 3.0,
    moved: float = 3.0,
    key: typing.Any,
    first_row: int = 0,
    c1: float = 0.75,
    c2: float = 1.25,
    tries_per_atom: int = 100,
    tries_per_structure: int = 20,
    threads: int = 0,
) -> tuple:
    """
    Move some free atoms of every parent by vectors uniform in a ball of radius `amplitude` [angstrom].

    Each of a parent's n free atoms moves with probability moved / n (at least one), into the box, no atom closer than c1,
    one within c2 (units of the sum of covalent radii). Returns positions (m, 3) and ok (n,) bool; rows that failed hold the
    parent. Raises ConfigurationError without a box.
    """

def relax(
    landscape: Landscape,
    batch: typing.Any,
    *,
    steps: int = 100,
    force_tolerance: float = 0.05,
    max_step: float = 0.2,
    memory: int = 10,
    first_curvature: float = 70.0,
    box: typing.Any = None,
    threads: int = 0,
) -> tuple[
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int32],
    numpy.typing.NDArray[numpy.bool],
]:
    """
    Relax every structure of a batch on a landscape with L-BFGS.

    steps: evaluations per structure beyond the first; force_tolerance [eV/angstrom]: largest force on one atom, fixed
    coordinates and forces into walls not counted; max_step [angstrom]: largest move of one atom in one step; box: None or
    (corner (3,), vectors (3, 3), open (3,) bool), walls that free atoms do not cross (open: no walls along that vector);
    threads = 0: as many as this process may use. The result of a structure depends neither on the batch nor on threads.

    Returns positions (m, 3), energies (n,) [eV], forces (m, 3) [eV/angstrom], evaluations (n,), converged (n,) bool.
    Raises ConfigurationError for settings out of range or a box without volume.
    """

__version__: str = "0.1.0"

def q_weight_count(
    dimension: int, channels: collections.abc.Sequence[int], kernels: collections.abc.Sequence[int]
) -> int:
    """
    Weights and biases of a network with these channels (n + 1) and kernel edges (n).
    """

def q_receptive_radius(kernels: collections.abc.Sequence[int], dilations: collections.abc.Sequence[int]) -> int:
    """
    Voxels from an input to the farthest output that it changes: sum of (k - 1) / 2 times dilation.
    """

class QNetwork:
    """
    Convolutional network of an ASLA agent; immutable.

    weights: per layer (outputs, inputs, k, k[, k]) float32, PyTorch's order; biases: per layer (outputs,). Leaky ReLU of slope
    0.01 behind every layer but the last, tanh behind the last. representation: (channels, species, w, w[, w]), what an atom of
    a species adds to the input around its voxel (None: one-hot); representation_bias: (channels,), added everywhere.
    """
    def __init__(
        self,
        weights: collections.abc.Sequence[numpy.typing.ArrayLike],
        biases: collections.abc.Sequence[numpy.typing.ArrayLike],
        *,
        dilations: collections.abc.Sequence[int],
        representation: numpy.typing.ArrayLike | None = None,
        representation_bias: numpy.typing.ArrayLike | None = None,
    ) -> None: ...
    @property
    def dimension(self) -> int: ...
    @property
    def species(self) -> int: ...
    @property
    def weight_count(self) -> int: ...
    @property
    def receptive_radius(self) -> int: ...

class QMap:
    """
    A network on a grid: the value Q of placing one more atom, for every species and voxel.

    shape, periodic: one entry per direction; open directions are padded with zeros at every layer. Voxels are numbered as
    NumPy's flat index does. Make a new map after a weight update: tables are made when first needed.
    """
    def __init__(
        self, network: QNetwork, shape: collections.abc.Sequence[int], periodic: collections.abc.Sequence[bool]
    ) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def voxels(self) -> int: ...
    def dense(
        self, species: numpy.typing.ArrayLike, voxels: numpy.typing.ArrayLike
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Q (species, *shape) with atoms `species` (n,) placed at `voxels` (n,), by plain sums: the reference.
        """
    def batch(
        self,
        offsets: numpy.typing.ArrayLike,
        species: numpy.typing.ArrayLike,
        voxels: numpy.typing.ArrayLike,
        *,
        threads: int = 0,
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Q (n, species, *shape) of n states; state i has placed atoms offsets[i] .. offsets[i + 1] - 1.

        The bits of a state depend neither on threads nor on the other states.
        """
    def choose(self, asked: int) -> str:
        """
        The method that 'automatic' stands for when Q is asked for at about `asked` voxels after each atom.
        """

class QDelta:
    """
    What placing one atom changes; bound to the atoms placed before it.
    """
    @property
    def species(self) -> int: ...
    @property
    def voxel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class QState:
    """
    Atoms placed one by one on a map, and Q after each; not for use by two threads at once.

    method: 'automatic' (a cost model chooses), 'direct', 'local_fft' (both update the changed boxes) or 'grid_fft' (transforms
    the whole grid when Q is asked for).
    """
    def __init__(self, map: QMap, method: str = "automatic") -> None: ...
    @property
    def method(self) -> str: ...
    @property
    def species(self) -> numpy.typing.NDArray[numpy.int32]: ...
    @property
    def voxels(self) -> numpy.typing.NDArray[numpy.int64]: ...
    def place(self, species: int, voxel: int) -> None:
        """
        Raises ConfigurationError for a species or voxel that does not exist.
        """
    def undo(self) -> None:
        """
        Takes the last atom back, exactly.
        """
    def retract(self) -> QDelta:
        """
        undo(), but returns the change, for apply().
        """
    def expand(self, species: int, voxel: int) -> QDelta:
        """
        The change that placing an atom would make, for apply().
        """
    def apply(self, delta: QDelta) -> None:
        """
        Places the atom of a change that expand() or retract() gave for the atoms placed now; no arithmetic.
        """
    def q(self, voxels: numpy.typing.ArrayLike | None = None) -> numpy.typing.NDArray[numpy.float32]:
        """
        Q (species, n) at n voxels, or (species, *shape) everywhere.
        """
