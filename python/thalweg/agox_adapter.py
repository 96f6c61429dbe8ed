"""Descriptors, models and relaxation of thalweg as modules of AGOX 3.11 (docs/backend.md, "Inside AGOX").

    from thalweg.agox_adapter import GPRModel

    model = GPRModel(database=database)                    # in the place of agox.models.GPR.GPR
    acquisitor = LowerConfidenceBoundAcquisitor(model=model, kappa=2)

Importing this module imports AGOX, which needs an environment of its own; nothing else in thalweg does. Everything raises
ConfigurationError for structures that it cannot take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.descriptors import FCHL19, SOAP, Fingerprint
from thalweg.errors import BackendUnavailable, ConfigurationError
from thalweg.models import GPR
from thalweg.records import Batch

try:
    import agox.utils.ray.pool_startup
    from agox.models import ModelBaseClass
    from agox.models.descriptors import DescriptorBaseClass
    from agox.postprocessors.ABC_postprocess import PostprocessBaseClass
    from ase import Atoms
    from ase.calculators.calculator import Calculator, all_changes
    from ase.calculators.singlepoint import SinglePointCalculator
except ImportError as error:
    raise BackendUnavailable(
        f"thalweg.agox_adapter needs AGOX, which cannot be imported ({error}); in an environment of its own: "
        "pip install thalweg agox==3.11.1 'ase==3.27.0' 'numpy<2.4'"
    ) from error

__all__ = ["FCHL19Descriptor", "FingerprintDescriptor", "GPRModel", "RelaxPostprocess", "SOAPDescriptor"]

Array = np.ndarray


# ---- descriptors -------------------------------------------------------------------------------------------------


class FingerprintDescriptor(DescriptorBaseClass):
    """The fingerprint of a structure as a global descriptor: one centre.

    environment : AGOX's
    descriptor : default: the one with the values of AGOX's `Fingerprint()`
    """

    name = "ThalwegFingerprint"
    descriptor_type = "global"

    def __init__(self, environment: Any, descriptor: Fingerprint | None = None, **module: Any):
        super().__init__(environment=environment, **module)
        self.descriptor = descriptor if descriptor is not None else Fingerprint(convention="agox")

    def get_number_of_centers(self, atoms: Atoms) -> int:
        """Always 1."""
        return 1

    def create_features(self, atoms: Atoms) -> Array:
        """(1, D)."""
        return self.descriptor.values(_batch(atoms), 1)

    def create_feature_gradient(self, atoms: Atoms) -> Array:
        """(1, atoms, 3, D) [1/angstrom], the exact derivative of the features."""
        return self.descriptor.jacobian(_batch(atoms), 1)[None]


class _AtomDescriptor(DescriptorBaseClass):
    """Features of every atom as a local descriptor, for AGOX's `SparseGPR`: each atom is a centre."""

    descriptor_type = "local"

    def __init__(self, environment: Any, descriptor: Any, **module: Any):
        super().__init__(environment=environment, **module)
        if descriptor.species is None:
            descriptor = replace(descriptor, species=[int(number) for number in environment.get_all_types()])
        self.descriptor = descriptor

    def get_number_of_centers(self, atoms: Atoms) -> int:
        """The number of atoms."""
        return len(atoms)

    def create_features(self, atoms: Atoms) -> Array:
        """(atoms, D)."""
        return self.descriptor.values(_batch(atoms), 1)

    def create_feature_gradient(self, atoms: Atoms) -> Array:
        """(atoms, atoms, 3, D) [1/angstrom]: of each centre, for each atom that moves."""
        return self.descriptor.jacobian(_batch(atoms), 1)[0]


class SOAPDescriptor(_AtomDescriptor):
    """SOAP of every atom as a local descriptor, for AGOX's `SparseGPR`: each atom is a centre.

    environment : AGOX's; its species are those of the descriptor, unless that names its own
    descriptor : default: r_cut 4, n_max 3, l_max 2, sigma 1, as AGOX's `SOAP()`; but neighbours are not weighted, as in
        `SOAP(weight=False)`, and fade smoothly beyond r_cut (cutoff="hard": its values)
    """

    name = "ThalwegSOAP"

    def __init__(self, environment: Any, descriptor: SOAP | None = None, **module: Any):
        found = descriptor if descriptor is not None else SOAP(4.0, 3, 2, 1.0)
        if found.average != "off":
            raise ConfigurationError(
                f"a local descriptor has features of each atom: average='off', got {found.average!r}"
            )
        super().__init__(environment, found, **module)


class FCHL19Descriptor(_AtomDescriptor):
    """FCHL19 of every atom as a local descriptor, for AGOX's `SparseGPR`: each atom is a centre.

    environment : AGOX's; its species are those of the descriptor, unless that names its own
    descriptor : default `FCHL19()`
    """

    name = "ThalwegFCHL19"

    def __init__(self, environment: Any, descriptor: FCHL19 | None = None, **module: Any):
        super().__init__(environment, descriptor if descriptor is not None else FCHL19(), **module)


# ---- model -------------------------------------------------------------------------------------------------------


class GPRModel(ModelBaseClass):
    """A model of thalweg as one of AGOX: for its acquisitors, relaxations, samplers and Ray's workers.

    Parameters
    ----------
    model : GPR, LocalGPR or ChosenModel
        What learns; default `GPR()`. `GPR(Fingerprint(convention="agox"), prior="repulsive", noise=0.01)` is nearest to
        AGOX's own. It must be picklable for Ray: priors by name.
    database, filter, order, ... :
        As for every model of AGOX; with a database it learns whenever that has grown. No filter is needed: see
        `GPR(max_rows=, energy_window=)`.

    Atoms of a candidate's template count as fixed while learning. Uncertainties are those of AGOX: sigma [eV] and
    -d sigma/dx [eV/angstrom]. `model.fitted` is thalweg's own fitted model.
    """

    name = "ThalwegGPR"
    implemented_properties = ("energy", "forces", "uncertainty", "forces_uncertainty")

    def __init__(self, model: Any = None, **module: Any):
        super().__init__(**module)
        self.model = model if model is not None else GPR()
        self.learned = _Learned(self.model, Batch.empty(), self.model.fit(Batch.empty()))
        # Workers get what changes; at once, not at the end of an iteration.
        for attribute in ("learned", "_ready_state"):
            self.add_dynamic_attribute(attribute)
        self.self_synchronizing = True

    @property
    def fitted(self) -> Any:
        """The fitted model of thalweg; without data, the prior."""
        return self.learned.fitted

    # ---- learning ------------------------------------------------------------------------------------
    def train(self, training_data: Sequence[Atoms], **_: Any) -> None:
        """Learns structures that have energies, and forces if the model uses them; cheap where they only grew in number.

        Raises ConfigurationError for a structure without an energy, or for several compositions where that is beyond it.
        """
        data = list(training_data)
        if self.filter is not None:
            data, _kept = self.filter(data)
        batch = _training_batch(data)
        self.learned = _Learned(self.model, batch, self.model.fit(batch, self.fitted))
        self.ready_state = self.fitted.size > 0
        self._training_record(data)
        self.reset()
        self._tell_workers()
        self.print_model_info(validation=self.validate())

    def _tell_workers(self) -> None:
        pool = agox.utils.ray.pool_startup.ray_pool_instance
        if pool is not None and self.ray_key in pool.modules:
            pool.synchronize_module(self, writer=self.writer)

    def model_info(self, **_: Any) -> list[str]:
        """Lines for AGOX's log."""
        return ["------ Model Info ------", repr(self.fitted)]

    # ---- predictions ---------------------------------------------------------------------------------
    def converter(self, atoms: Atoms, derivatives: bool = True, **_: Any) -> dict[str, Any]:
        """All that the predictions of one structure need, in one call of the core; given to them as keywords."""
        return {"predicted": self._predict(atoms, derivatives)}

    def predict_energy(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """eV; a list for a list of structures, as all predictions."""
        return self._one_or_many(atoms, predicted, 0)

    def predict_uncertainty(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """sigma [eV]; 0 before anything was learned."""
        return self._one_or_many(atoms, predicted, 1)

    def predict_forces(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """(atoms, 3) [eV/angstrom]."""
        return self._one_or_many(atoms, predicted, 2)

    def predict_uncertainty_forces(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """-d sigma/dx (atoms, 3) [eV/angstrom]."""
        return self._one_or_many(atoms, predicted, 3)

    def predict_energy_and_uncertainty(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """eV, eV."""
        if isinstance(atoms, list):
            return [self.predict_energy_and_uncertainty(one) for one in atoms]
        return (predicted or self._predict(atoms, False))[:2]

    def predict_forces_and_uncertainty(self, atoms: Any, predicted: Any = None, **_: Any) -> Any:
        """(atoms, 3), (atoms, 3) [eV/angstrom]."""
        if isinstance(atoms, list):
            return [self.predict_forces_and_uncertainty(one) for one in atoms]
        return (predicted or self._predict(atoms, True))[2:]

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """As a calculator of ASE: energy, forces, uncertainty and forces_uncertainty at once."""
        Calculator.calculate(self, atoms, properties, system_changes)
        names = ("energy", "uncertainty", "forces", "forces_uncertainty")
        self.results.update(zip(names, self._predict(self.atoms, True), strict=True))

    def kernel(self, features: Array, others: Array) -> Array:
        """(n, m) covariances [eV^2] of features (n, D), (m, D) of the model's descriptor; for AGOX's `KernelSimSampler`."""
        if not hasattr(self.fitted, "similarity"):
            raise ConfigurationError(f"{type(self.fitted).__name__} has no kernel of whole structures; use GPR")
        kernel = self.fitted.kernel
        total = kernel.amplitude * (kernel.weight_long + kernel.weight_short)
        return total * np.array([self.fitted.similarity(feature, others) for feature in features])

    def _one_or_many(self, atoms: Any, predicted: Any, which: int) -> Any:
        if isinstance(atoms, list):
            return [self._one_or_many(one, None, which) for one in atoms]
        if predicted is None or len(predicted) <= which:
            predicted = self._predict(atoms, which > 1)
        return predicted[which]

    def _predict(self, atoms: Atoms, forces: bool) -> tuple[Any, ...]:
        found = self.fitted.predict(_batch(atoms), forces=forces, threads=1)
        sigma = float(found[1][0]) if self.ready_state else 0.0
        return (float(found[0][0]), sigma, *found[2:])

    # ---- files ---------------------------------------------------------------------------------------
    def save(self, path: str = "model.h5") -> None:
        """What was learned, not the settings: `load` of a model that was made with the same ones takes it."""
        import h5py

        with h5py.File(path, "w") as file:
            for name, values in self.learned.arrays.items():
                file.create_dataset(name, data=values)
        self.writer(f"Saving model to {path}")

    def load(self, path: str) -> None:
        """Takes what `save` wrote: predictions are the same to the bit."""
        import h5py

        with h5py.File(path, "r") as file:
            self.learned = _Learned.of(self.model, {name: np.asarray(values) for name, values in file.items()})
        self.ready_state = self.fitted.size > 0
        self._tell_workers()
        self.writer(f"Model loaded from {path}")


class _Learned:
    """A fitted model that travels: compiled parts stay behind and are made again from a few arrays, bit for bit."""

    def __init__(self, model: Any, data: Batch, fitted: Any):
        self.model, self.data, self.fitted = model, data, fitted

    @property
    def arrays(self) -> dict[str, Array]:
        """`state` of the fitted model, and the data."""
        data = self.data
        found = {f"state_{name}": np.asarray(values) for name, values in self.fitted.state.items()}
        found.update({name: getattr(data, name) for name in _ARRAYS})
        found.update({f"column_{name}": values for name, values in data.columns.items()})
        found.update({f"atom_column_{name}": values for name, values in data.atom_columns.items()})
        return found

    @staticmethod
    def of(model: Any, arrays: Mapping[str, Array]) -> _Learned:
        """From `arrays`."""

        def named(prefix: str) -> dict[str, Array]:
            return {name[len(prefix) :]: values for name, values in arrays.items() if name.startswith(prefix)}

        plain = {name: arrays[name] for name in _ARRAYS}
        data = Batch(**plain, columns=named("column_"), atom_columns=named("atom_column_"))
        return _Learned(model, data, model.restore(data, named("state_")))

    def __reduce__(self) -> Any:
        return _Learned.of, (self.model, self.arrays)


_ARRAYS = ("positions", "numbers", "offsets", "cells", "pbc", "fixed")


# ---- relaxation --------------------------------------------------------------------------------------------------


class RelaxPostprocess(PostprocessBaseClass):
    """Relaxes all candidates of an iteration on a `GPRModel`, in one compiled call; for AGOX's
    `ParallelRelaxPostprocess(model=acquisitor.get_acquisition_calculator())`, without Ray.

    Parameters
    ----------
    model : GPRModel
    environment : AGOX's
        Placed atoms stay in its box; the template is fixed if it says so (other constraints are not known here).
    kappa : float
        Down on energy - kappa sigma.
    start_relax, steps, fmax : int, int, float
        First iteration that relaxes; steps at most; largest force on an atom where a relaxation ends [eV/angstrom].
    threads : int
        0: what affinity and cgroups leave; candidates do not depend on it.
    """

    name = "ThalwegRelax"

    def __init__(
        self, model: GPRModel, environment: Any, *, kappa: float = 2.0, start_relax: int = 1, steps: int = 200,
        fmax: float = 0.05, threads: int = 0, order: float = 2, **module: Any,
    ):  # fmt: skip
        super().__init__(order=order, **module)
        self.model, self.environment, self.kappa, self.threads = model, environment, kappa, threads
        self.start_relax, self.steps, self.fmax = start_relax, steps, fmax

    def do_check(self, **_: Any) -> bool:
        """Whether this iteration relaxes."""
        return self.check_iteration_counter(self.start_relax) and self.model.ready_state

    def postprocess(self, candidate: Any) -> Any:
        """One candidate, moved in place."""
        return self.process_list([candidate])[0]

    def process_list(self, list_of_candidates: list[Any]) -> list[Any]:
        """The candidates, moved in place, with energy and forces of the surface that they were relaxed on."""
        candidates = [candidate for candidate in list_of_candidates if candidate is not None]
        if not candidates:
            return candidates
        template = len(self.environment.get_template())
        batch = _batch(candidates, template if self.environment.fix_template else 0)
        box = None
        if self.environment.use_box_constraint:
            vectors, corner = self.environment.get_confinement_cell(), self.environment.get_confinement_corner()
            open_directions = np.array(self.environment.box_constraint_pbc, bool)
            box = (np.array(corner, float), np.array(vectors, float), open_directions, template)
        positions, energies, forces, evaluations, converged = _core.relax(
            self.model.fitted.landscape(self.kappa), batch, steps=self.steps, force_tolerance=self.fmax, box=box,
            threads=self.threads,
        )  # fmt: skip
        for i, candidate in enumerate(candidates):
            atoms = slice(batch.offsets[i], batch.offsets[i + 1])
            candidate.set_positions(positions[atoms], apply_constraint=False)
            candidate.calc = SinglePointCalculator(candidate, energy=float(energies[i]), forces=forces[atoms])
        self.writer(f"{len(candidates)} candidates relaxed, {int(converged.sum())} to the end.")
        self.writer(f"Mean number of steps: {float(np.mean(evaluations)):.1f}")
        return candidates


# ---- structures --------------------------------------------------------------------------------------------------


def _batch(structures: Atoms | Sequence[Atoms], fixed: int = 0) -> Batch:
    """Structures, the first so many atoms of each fixed; constraints are AGOX's affair."""
    batch = Batch.from_ase(structures, constraints=False)
    if not fixed:
        return batch
    place = np.arange(batch.atoms) - np.repeat(batch.offsets[:-1], np.diff(batch.offsets))
    return _with_fixed(batch, place < fixed)


def _training_batch(structures: Sequence[Atoms]) -> Batch:
    """Structures with energies, atoms of their templates fixed."""
    batch = Batch.from_ase(structures, constraints=False)
    missing = int(np.sum(~np.isfinite(batch.columns.get("energy", np.full(len(batch), np.nan)))))
    if missing:
        raise ConfigurationError(
            f"{missing} of {len(batch)} structures to learn have no energy; each needs a calculator with results"
        )
    fixed = np.zeros(batch.atoms, bool)
    for start, one in zip(batch.offsets, structures, strict=False):
        if hasattr(one, "get_template_indices"):  # a candidate
            fixed[start + np.asarray(one.get_template_indices(), int)] = True
    return _with_fixed(batch, fixed)


def _with_fixed(batch: Batch, fixed: Array) -> Batch:
    return replace(batch, fixed=np.repeat(fixed[:, None], 3, axis=1))
