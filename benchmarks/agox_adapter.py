"""thalweg.agox_adapter inside AGOX: values, whole searches, and seconds per iteration beside AGOX's own model.

Runs in an environment that has both (`pip install thalweg agox==3.11.1 "ase==3.27.0" "numpy<2.4"`):

    python benchmarks/agox_adapter.py [--iterations 20] [--skip-ray]

Three arms of AGOX's own GOFEE on Au4Ni4 (EMT), with the modules and settings of `agox.algorithms`: its own model; `GPRModel`
in the place of its model; and `RelaxPostprocess` in the place of its relaxation, too. Each runs twice: with Ray, one
worker, as AGOX does (wall time); and in this very process (`against_agox.without_ray`: processor time, no copies between
processes, which favours AGOX). Without the seconds in EMT; medians over the second half of the iterations. One thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "THALWEG_NUM_THREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))

import matplotlib  # noqa: E402 threads are set first

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from against_agox import without_ray  # noqa: E402
from agox import Observer  # noqa: E402
from agox.algorithms.config import ProblemConfig, RunConfig  # noqa: E402
from agox.algorithms.gofee import GOFEE  # noqa: E402
from agox.environments import Environment  # noqa: E402
from agox.generators import RandomGenerator  # noqa: E402
from agox.models import GPR as AgoxGPR  # noqa: E402,F401 its modules are loaded before anything is timed
from agox.models.descriptors import SOAP as AgoxSOAP  # noqa: E402
from agox.models.descriptors import Fingerprint as AgoxFingerprint  # noqa: E402
from agox.models.GPR import SparseGPR  # noqa: E402
from agox.models.GPR.kernels import RBF, Constant  # noqa: E402
from agox.samplers import FixedSampler  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.calculators.emt import EMT  # noqa: E402
from ase.calculators.singlepoint import SinglePointCalculator  # noqa: E402
from thalweg import GPR, SOAP, Fingerprint  # noqa: E402
from thalweg.agox_adapter import FingerprintDescriptor, GPRModel, RelaxPostprocess, SOAPDescriptor  # noqa: E402

CELL, BOX = 12.0, 6.0
CORNER = np.full(3, (CELL - BOX) / 2)
# as near to AGOX's defaults as thalweg's model comes: features, mean function, noise
LIKE_AGOX = GPR(Fingerprint(convention="agox"), prior="repulsive", noise=0.01)
spent = {"wall": 0.0, "cpu": 0.0}  # in EMT
counted: list[float] = []


class Clock(Observer):
    """Notes the end of every iteration."""

    name = "Clock"

    def __init__(self):
        super().__init__(order=1000)
        self.ends = []
        self.add_observer_method(self.tick, gets={}, sets={}, order=1000, handler_identifier="AGOX")

    @Observer.observer_method
    def tick(self, state):
        self.ends.append((time.perf_counter() - spent["wall"], time.process_time() - spent["cpu"]))


class Counted(EMT):
    def calculate(self, *arguments, **keywords):
        begin = time.perf_counter(), time.process_time()
        super().calculate(*arguments, **keywords)
        spent["wall"] += time.perf_counter() - begin[0]
        spent["cpu"] += time.process_time() - begin[1]
        counted.append(float(self.results["energy"]))


class Timed(GOFEE):
    """AGOX's GOFEE and a clock."""

    KIND = "timed-gofee"

    def _setup_modules(self):
        self.clock = Clock()
        return (*super()._setup_modules(), self.clock)


class WithModel(Timed):
    """thalweg's model in the place of AGOX's."""

    KIND = "timed-gofee-model"

    def _make_model(self, cfg):
        return GPRModel(LIKE_AGOX, database=self.get_database())


class WithModelAndRelaxation(WithModel):
    """And its relaxation."""

    KIND = "timed-gofee-model-relaxation"

    def _make_relaxer(self, cfg, order, model):
        return RelaxPostprocess(
            model.model, self.get_environment(), order=order, start_relax=cfg.start_relax, steps=cfg.max_steps,
            fmax=cfg.fmax,
        )  # fmt: skip


ARMS = {"AGOX's own": Timed, "+ GPRModel": WithModel, "+ RelaxPostprocess": WithModelAndRelaxation}


def structures(environment: Environment, count: int) -> list[Atoms]:
    """Random ones with energies and forces of EMT."""
    generator, made = RandomGenerator(**environment.get_confinement()), []
    while len(made) < count:
        for candidate in generator(FixedSampler([]), environment):
            atoms = Atoms(candidate.numbers, candidate.positions, cell=candidate.cell, pbc=candidate.pbc)
            atoms.calc = EMT()
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            made.append(atoms)
    return made


def values() -> list[tuple[str, float, float]]:
    """What is compared, largest difference relative to the largest value, and the bound."""
    template = Atoms(cell=[CELL] * 3, pbc=False)
    environment = Environment(
        template=template, symbols="Au4Ni4", confinement_cell=BOX * np.eye(3), confinement_corner=CORNER,
        print_report=False,
    )  # fmt: skip
    known = structures(environment, 24)

    def difference(ours, theirs) -> float:
        return max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in ((np.asarray(ours(one)), np.asarray(theirs(one))) for one in known[:5])
        )

    ours, theirs = FingerprintDescriptor(environment), AgoxFingerprint(environment=environment)
    soap = SOAPDescriptor(environment, SOAP(4.0, 3, 2, 1.0, cutoff="hard"))
    dscribe = AgoxSOAP(environment=environment, weight=False, periodic=False)
    sparse = SparseGPR(
        descriptor=SOAPDescriptor(environment), kernel=Constant(1.0) * RBF(20.0), sigma_E=0.01, use_ray=False
    )
    sparse.train(known)
    model = GPRModel(LIKE_AGOX)
    model.train(known)
    many = model.predict_energy(known)
    return [
        ("fingerprint", difference(ours.create_features, theirs.create_features), 1e-10),
        ("fingerprint's gradient, by differences",
         difference(ours.create_feature_gradient, ours.central_difference_gradient), 1e-6),
        ("SOAP", difference(soap.create_features, dscribe.create_features), 1e-8),
        ("SOAP's gradient", difference(soap.create_feature_gradient, dscribe.create_feature_gradient), 1e-6),
        ("forces of SparseGPR on SOAPDescriptor, by differences",
         difference(sparse.predict_forces, sparse.predict_forces_central), 1e-3),
        ("forces of GPRModel, by differences", difference(model.predict_forces, model.predict_forces_central), 1e-3),
        ("GPRModel at what it learned (noise 0.1 eV)",
         float(np.sqrt(np.mean([(e - one.get_potential_energy()) ** 2 for e, one in zip(many, known, strict=True)]))), 0.5),
    ]  # fmt: skip


def search(arm: type, iterations: int, seed: int) -> dict:
    """One run: seconds per iteration (wall, processor) in the second half, evaluations and the lowest energy."""
    counted.clear()
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        problem = ProblemConfig(
            template=Atoms(cell=[CELL] * 3, pbc=False), symbols="Au4Ni4", confinement_cell=BOX * np.eye(3),
            confinement_corner=CORNER, calculator=Counted(),
        )  # fmt: skip
        algorithm = arm.create(problem=problem, run=RunConfig(path=folder, seed=seed, cpu_count=1))
        algorithm.run(iterations)
        os.chdir(before)
    seconds = np.diff(np.array(algorithm.clock.ends), axis=0)[iterations // 2 :]
    wall, cpu = np.median(seconds, axis=0)
    return {"wall": wall, "cpu": cpu, "evaluations": len(counted), "lowest": min(counted)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--iterations", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--skip-ray", action="store_true", help="only within this process")
    settings = arguments.parse_args()
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # AGOX prints much: to stderr
    np.random.seed(settings.seed)  # noqa: NPY002 AGOX draws from the global generator
    wrong = False
    for what, found, bound in values():
        said.write(f"{what}: {found:.1e} (at most {bound:g})\n")
        wrong |= not found <= bound
    modes = ([] if settings.skip_ray else [("Ray, one worker", "wall")]) + [("in one process", "cpu")]
    for title, kind in modes:
        if kind == "cpu":
            without_ray()
        first = None
        for name, arm in ARMS.items():
            found = search(arm, settings.iterations, settings.seed)
            first = first or found[kind]
            said.write(
                f"{title}, {name}: {1e3 * found[kind]:.0f} ms per iteration ({kind}; {first / found[kind]:.1f} x), "
                f"{found['evaluations']} evaluations, lowest {found['lowest']:.3f} eV\n"
            )
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
