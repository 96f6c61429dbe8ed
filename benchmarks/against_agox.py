"""AGOX's side of `thalweg bench ... --against agox`: runs inside AGOX's own environment and knows nothing of thalweg.

Reads one request per line (JSON) from stdin and answers each with one line of JSON on stdout; what AGOX prints goes to
stderr. AGOX hands its work to worker processes of Ray. Here its pool is replaced by one worker in this very process, so
that no start of Ray, no copying between processes and no second core is in the figures: all of that favours AGOX.
Times are processor time of this process, one thread.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402 threads are set first


class PoolInProcess:
    """What AGOX's modules ask of its pool of Ray actors, done at once and here."""

    def __init__(self):
        self.modules, self.attached_handlers = {}, []

    def add_module(self, module):
        self.modules[module.ray_key] = module
        return module.ray_key

    def get_key(self, module):
        return module.ray_key

    def remove_module(self, module):
        self.modules.pop(module.ray_key, None)

    def task_map(self, tasks):
        return [
            task.function(*(self.modules[key] for key in task.modules), *task.args, **task.kwargs) for task in tasks
        ]

    def map(self, function, modules, arguments, keywords):
        calls = zip(modules, arguments, keywords, strict=True)
        return [
            function(*(self.modules[key] for key in keys), *positional, **named) for keys, positional, named in calls
        ]

    def nothing(self, *arguments, **keywords):
        """Actors share this process's modules: nothing to attach, print or bring up to date."""

    attach = print_modules = update_module_interconnections = update_modules = synchronize_module = nothing


def without_ray() -> None:
    """Puts the pool in place."""
    import agox.collectors.ray_collector
    import agox.utils.ray
    import agox.utils.ray.pool_user

    pool = PoolInProcess()
    agox.utils.ray.pool_user.get_ray_pool = lambda *arguments, **keywords: (pool, {"CPU": 1})
    agox.utils.ray.ray_startup = lambda *arguments, **keywords: {"CPU": 1}

    class References:
        put = staticmethod(lambda module: module)

    agox.collectors.ray_collector.ray = References


def hello(request: dict) -> dict:
    """Versions."""
    from importlib.metadata import version

    without_ray()
    return {name: version(name) for name in ("agox", "ase", "numpy", "scipy", "ray")}


def atoms_of(structures: dict) -> list:
    """Structures of one composition: numbers (n,), positions (k, n, 3), cell, pbc and, if known, energies (k,)."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    made = [
        Atoms(structures["numbers"], positions=positions, cell=structures["cell"], pbc=structures["pbc"])
        for positions in structures["positions"]
    ]
    for atoms, energy in zip(made, structures.get("energies", []), strict=False):
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return made


def environment_of(problem: dict):
    """AGOX's environment: the template (positions may be empty), what is placed, and the box."""
    from agox.environments import Environment
    from ase import Atoms

    template = Atoms(problem["template_numbers"], cell=problem["cell"], pbc=problem["pbc"])
    if len(template):
        template.positions = problem["template_positions"]
    return Environment(
        template=template,
        symbols=problem["symbols"],
        confinement_cell=np.array(problem["box_vectors"]),
        confinement_corner=np.array(problem["box_corner"]),
        box_constraint_pbc=problem["box_open"],
        print_report=False,
    )


def candidates_of(problem: dict, structures: dict) -> list:
    """The same as AGOX's candidates, which keep features that were computed once."""
    from agox.candidates import StandardCandidate

    template = environment_of(problem).get_template()
    return [StandardCandidate.from_atoms(template, atoms) for atoms in atoms_of(structures)]


def moved(atoms):
    """Positions that no cache knows."""
    moved.count += 1
    atoms.positions += 1e-7 * (-1) ** moved.count
    return atoms


moved.count = 0
kept: dict = {}


def timed(call, seconds: float) -> float:
    """Processor seconds per call, of as many calls as fit."""
    calls, begin = 0, time.process_time()
    while calls == 0 or time.process_time() - begin < seconds:
        call()
        calls += 1
    return (time.process_time() - begin) / calls


def fingerprint(request: dict) -> dict:
    """`Fingerprint.create_features` or `.create_feature_gradient` (compiled, Cython), and the values."""
    from agox.models.descriptors import Fingerprint

    atoms = atoms_of(request["structures"])[0]
    if request["name"] not in kept:
        kept[request["name"]] = Fingerprint.from_atoms(atoms)
    descriptor = kept[request["name"]]
    call = descriptor.create_feature_gradient if request["gradient"] else descriptor.create_features
    values = np.asarray(call(atoms))
    values = values[0].ravel().tolist()
    return {"seconds": timed(lambda: call(moved(atoms)), request["seconds"]), "values": values}


def new_model(problem: dict, theta=None, optimise: bool = False):
    """AGOX's GPR as its GOFEE sets it up; theta: amplitude, length_short, length_long, noise."""
    from agox.models.descriptors import Fingerprint
    from agox.models.GPR import GPR
    from agox.models.GPR.kernels import RBF, Constant, Noise
    from agox.models.GPR.priors import Repulsive

    amplitude, short, long, noise = theta or (5000.0, 1.0, 1.0, 0.01)
    beta = 0.01
    kernel = Constant(amplitude, (1, 1e5)) * (
        Constant(beta, (beta, beta)) * RBF(short) + Constant(1 - beta, (1 - beta, 1 - beta)) * RBF(long)
    ) + Noise(noise, (noise, noise))
    descriptor = Fingerprint(environment=environment_of(problem))
    return GPR(descriptor=descriptor, kernel=kernel, prior=Repulsive(), filter=None, n_optimize=1 if optimise else 0)


def model(request: dict) -> dict:
    """Learns structures with given hyperparameters and keeps the model by name."""
    from agox.acquisitors import LowerConfidenceBoundAcquisitor

    learner = new_model(request["problem"], request["theta"])
    learner.train(candidates_of(request["problem"], request["structures"]))
    surface = LowerConfidenceBoundAcquisitor(model=learner, kappa=2).get_acquisition_calculator()
    kept[request["name"]] = learner, surface
    return {"n": len(learner.X)}


def predict(request: dict) -> dict:
    """Energy, sigma and LCB forces of a kept model."""
    learner, surface = kept[request["name"]]
    energies, sigmas, forces = [], [], []
    for atoms in atoms_of(request["structures"]):
        energy, sigma = learner.predict_energy_and_uncertainty(atoms)
        surface.calculate(atoms, ["energy", "forces"])
        energies.append(float(energy))
        sigmas.append(float(sigma))
        forces.append(np.asarray(surface.results["forces"]).tolist())
    return {"energy": energies, "sigma": sigmas, "forces": forces}


def lcb(request: dict) -> dict:
    """LCB energy and forces in one `calculate`, as an optimiser that asks for forces calls it: each matrix once."""
    surface = kept[request["name"]][1]
    several = atoms_of(request["structures"])
    turn = iter(range(10**9))

    def call():
        surface.calculate(moved(several[next(turn) % len(several)]), ["energy", "forces"])

    return {"seconds": timed(call, request["seconds"])}


def relax(request: dict) -> dict:
    """`remote_relax` (what AGOX runs on its workers; ASE's BFGS, box constraint) of candidates on the LCB surface."""
    from agox.postprocessors.ray_relax.remote_relax import remote_relax
    from ase.optimize import BFGS

    surface = kept[request["name"]][1]
    candidates = candidates_of(request["problem"], request["structures"])
    constraints = environment_of(request["problem"]).get_constraints()
    for candidate in candidates:
        candidate.set_constraint(constraints)
    begin, steps, final = time.process_time(), 0, []
    for candidate in candidates:
        settings = {"fmax": 0.05, "steps": request["steps"]}
        result = remote_relax(surface, candidate, BFGS, {"logfile": None}, settings)
        steps += max(result.relaxation_steps, 0)
        final.append(float(result.final_energy))
    return {"seconds": time.process_time() - begin, "steps": steps, "energies": final}


def fit(request: dict) -> dict:
    """`GPR.train` with hyperparameters from `theta` or AGOX's defaults; features are in the candidates' caches before."""
    learner = new_model(request["problem"], request.get("theta"), optimise=True)
    candidates = candidates_of(request["problem"], request["structures"])
    learner.descriptor.get_features(candidates)
    begin = time.process_time()
    learner.train(candidates)
    return {
        "seconds": time.process_time() - begin,
        "log_likelihood": -float(learner._nlml),
        "theta": np.exp(learner.kernel.theta).tolist(),
    }


def likelihood(request: dict) -> dict:
    """Log marginal likelihood and its gradient at the hyperparameters of a kept model."""
    learner = kept[request["name"]][0]
    theta = learner.kernel.theta.copy()
    value, gradient = learner._log_marginal_likelihood_gradient(theta)
    seconds = timed(lambda: learner._log_marginal_likelihood_gradient(theta), request["seconds"])
    return {"seconds": seconds, "value": float(value), "gradient": np.asarray(gradient).tolist()}


def complementary(environment, **confinement):
    """`ComplementaryEnergyGenerator` as its `default` sets it up, with attractors from the parent, but with one decay
    length instead of three: less work."""
    from agox.generators.ce_generator import ComplementaryEnergyGenerator
    from agox.generators.complementary_energy.attractor_methods.ce_attractors_current_structure import (
        AttractorCurrentStructure,
    )
    from agox.generators.complementary_energy.ce_calculators import ComplementaryEnergyDistanceCalculator
    from agox.models.descriptors.exponential_density import ExponentialDensity

    descriptor = ExponentialDensity(environment=environment, lambs=[1.0], rc=10.0)
    return ComplementaryEnergyGenerator(
        ComplementaryEnergyDistanceCalculator(descriptor=descriptor),
        descriptor,
        AttractorCurrentStructure(descriptor=descriptor, attractors_from_template=False),
        **confinement,
    )


def generate(request: dict) -> dict:
    """Structures per second of a generator (failures cost time and do not count); parents: given structures."""
    from agox.generators import PermutationGenerator, RandomGenerator, RattleGenerator
    from agox.samplers import FixedSampler

    environment = environment_of(request["problem"])
    kinds = {
        "random": RandomGenerator,
        "rattle": RattleGenerator,
        "permutation": PermutationGenerator,
        "complementary": lambda **confinement: complementary(environment, **confinement),
    }
    generator = kinds[request["kind"]](**environment.get_confinement())
    parents = candidates_of(request["problem"], request["structures"])
    for parent in parents:
        for key in ("uuid", "search_iteration"):
            parent.add_meta_information(key, 0)
        parent.add_meta_information("spawn_uuids", [])
    sampler = FixedSampler(parents)
    made = tried = 0
    np.random.seed(request["seed"])  # noqa: NPY002 AGOX draws from the global generator
    begin = time.process_time()
    while tried == 0 or time.process_time() - begin < request["seconds"]:
        made += len(generator(sampler, environment))
        tried += 1
    return {"seconds": time.process_time() - begin, "made": made, "tried": tried}


def iteration(request: dict) -> dict:
    """One iteration of AGOX's GOFEE on given data, the last two points new, without the true energy.

    Learn, sample, generate 3 + 7, relax up to 100 steps on the LCB surface, acquire, with the modules that
    `agox.algorithms` sets up.
    """
    from agox.algorithms.config import ParallelCollectorConfig, ProblemConfig, RunConfig
    from agox.algorithms.gofee import GOFEE, GOFEEConfig
    from ase import Atoms
    from ase.calculators.emt import EMT

    problem = request["problem"]
    settings = ProblemConfig(
        template=Atoms(cell=problem["cell"], pbc=problem["pbc"]),
        symbols=problem["symbols"],
        confinement_cell=np.array(problem["box_vectors"]),
        confinement_corner=np.array(problem["box_corner"]),
        calculator=EMT(),
    )
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        collector_settings = ParallelCollectorConfig(generator_fractions={0: [0.3, 0.7]})
        algorithm = GOFEE.create(
            algorithm=GOFEEConfig(collector=collector_settings),
            problem=settings,
            run=RunConfig(path=folder, seed=int(request["seed"]), cpu_count=1),
        )
        collector, relaxer, acquisitor, _, _, *tidy = algorithm._setup_modules()
        sampler, learner = collector.sampler, acquisitor.model
        data = candidates_of(problem, request["structures"])
        for candidate in data:
            for key in ("uuid", "search_iteration"):
                candidate.add_meta_information(key, 0)
            candidate.add_meta_information("spawn_uuids", [])
        np.random.seed(request["seed"])  # noqa: NPY002
        # as in a search: hyperparameters found step by step, features of all but the newest points known
        for n in [*range(4, len(data) - 2, 4), len(data) - 2]:
            learner.train(data[:n])
        sampler.setup(sampler.filters(data[:-2])[0])
        begin = time.process_time()
        learner.train(data)
        kept_data, _ = sampler.filters(data)
        sampler.setup(kept_data)
        learned = time.process_time()
        candidates = collector.make_candidates()
        generated = time.process_time()
        candidates = relaxer.process_list(candidates)
        relaxed = time.process_time()
        for module in tidy:
            candidates = [module.postprocess(candidate) for candidate in candidates]
        acquisitor.sort_according_to_acquisition_function(candidates)
        end = time.process_time()
        os.chdir(before)
    return {
        "seconds": end - begin,
        "learn": learned - begin,
        "generate": generated - learned,
        "relax": relaxed - generated,
        "candidates": len(candidates),
    }


def search(request: dict) -> dict:
    """One restart of AGOX's GOFEE with its own settings, as `agox.algorithms` sets it up.

    Every call of the calculator counts as one evaluation, in order.
    """
    from agox.algorithms import Algorithm
    from agox.algorithms.config import ProblemConfig, RunConfig
    from agox.algorithms.gofee import GOFEE
    from ase import Atoms
    from ase.calculators.emt import EMT

    energies, cpu, wall = [], time.process_time(), time.time()
    stamps = []

    class Counted(EMT):
        def calculate(self, *arguments, **keywords):
            super().calculate(*arguments, **keywords)
            energies.append(float(self.results["energy"]))
            stamps.append(time.process_time() - cpu)

    cell, box = float(request["cell"]), float(request["box"])
    problem = ProblemConfig(
        template=Atoms(cell=[cell] * 3, pbc=False),
        symbols=request["symbols"],
        confinement_cell=box * np.eye(3),
        confinement_corner=np.full(3, (cell - box) / 2),
        calculator=Counted(),
    )
    assert issubclass(GOFEE, Algorithm)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(path=folder, seed=int(request["seed"]), cpu_count=1)
        algorithm = GOFEE.create(problem=problem, run=run)
        settings = json.loads(json.dumps(algorithm.algorithm_cfg.to_dict(), default=str))
        algorithm.run(int(request["iterations"]))
        os.chdir(before)
    return {
        "seed": int(request["seed"]),
        "iterations": int(request["iterations"]),
        "energies": energies,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.time() - wall,
        "cpu_at_evaluation": stamps,
        "settings": settings,
    }


WORK = {
    function.__name__: function
    for function in (
        hello,
        fingerprint,
        model,
        predict,
        lcb,
        relax,
        fit,
        likelihood,
        generate,
        iteration,
        search,
    )
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # AGOX prints much
    import matplotlib

    matplotlib.use("Agg")
    hello({})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = WORK[request["work"]](request)
        except Exception as problem:
            traceback.print_exc()
            answer = {"error": f"{type(problem).__name__}: {problem}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
