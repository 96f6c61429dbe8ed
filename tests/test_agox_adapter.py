"""The adapter for AGOX. What it does inside AGOX is tested where AGOX is, and printed by benchmarks/agox_adapter.py."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from thalweg import GPR, SOAP
from thalweg.errors import BackendUnavailable, ConfigurationError
from thalweg.priors import CalculatorPrior

with_agox = pytest.mark.skipif(find_spec("agox") is None, reason="AGOX lives in an environment of its own")


@pytest.mark.skipif(find_spec("agox") is not None, reason="AGOX is there")
def test_without_agox_one_error_says_how_to_get_it():
    with pytest.raises(BackendUnavailable, match=r"pip install thalweg agox==3\.11\.1 'ase==3\.27\.0' 'numpy<2\.4'"):
        import thalweg.agox_adapter  # noqa: F401


def test_thalweg_itself_does_not_import_agox():
    code = "import sys, thalweg, thalweg.recipes, thalweg.kernels; print('agox' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_calculator_as_prior_travels():
    prior = CalculatorPrior("emt")
    assert pickle.loads(pickle.dumps(prior)) == prior
    model = GPR(prior={"calculator": "emt"})
    assert repr(pickle.loads(pickle.dumps(model))) == repr(model)


# ---- with AGOX ---------------------------------------------------------------------------------------------------


@pytest.fixture
def environment():
    from agox.environments import Environment

    return Environment(
        template=Atoms(cell=[12.0] * 3), symbols="Au4Ni4", confinement_cell=6 * np.eye(3),
        confinement_corner=np.full(3, 3.0), print_report=False,
    )  # fmt: skip


def clusters(count: int, template: Atoms | None = None) -> list[Atoms]:
    rng, made = np.random.default_rng(1), []
    while len(made) < count:
        atoms = Atoms("Au4Ni4", rng.uniform(3.5, 8.5, (8, 3)), cell=[12.0] * 3)
        if template is not None:
            atoms = template + atoms
        near = atoms.get_all_distances()[np.triu_indices(len(atoms), 1)].min()
        if near < 1.9:
            continue
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        made.append(atoms)
    return made


@with_agox
def test_descriptors_have_the_values_and_shapes_of_agox(environment):
    from agox.models.descriptors import Fingerprint
    from thalweg.agox_adapter import FCHL19Descriptor, FingerprintDescriptor, SOAPDescriptor

    atoms = clusters(1)[0]
    ours, theirs = FingerprintDescriptor(environment), Fingerprint(environment=environment)
    assert np.abs(ours.get_features(atoms) - theirs.get_features(atoms)).max() < 1e-10
    for descriptor, centres in ((ours, 1), (SOAPDescriptor(environment), 8), (FCHL19Descriptor(environment), 8)):
        features, gradient = descriptor.get_features(atoms), descriptor.get_feature_gradient(atoms)
        assert features.shape[0] == descriptor.get_number_of_centers(atoms) == centres
        assert gradient.shape == (centres, 8, 3, features.shape[1])
        difference = descriptor.central_difference_gradient(atoms)
        assert np.abs(gradient - difference).max() < 1e-6 * np.abs(gradient).max()
    with pytest.raises(ConfigurationError, match="average='off'"):
        SOAPDescriptor(environment, SOAP(average="mean"))


@with_agox
def test_model_predicts_what_thalweg_predicts(tmp_path):
    from thalweg.agox_adapter import GPRModel
    from thalweg.records import Batch

    data = clusters(12)
    model = GPRModel()
    assert not model.ready_state
    assert model.predict_uncertainty(data[0]) == 0.0
    model.train(data[:8])
    model.train(data)
    assert model.ready_state
    energy, sigma, forces, slope = model.fitted.predict(Batch.from_ase(data[0]), forces=True)
    everything = model.converter(data[0])
    for given in ({}, everything):
        assert model.predict_energy(data[0], **given) == energy[0]
        assert model.predict_uncertainty(data[0], **given) == sigma[0]
        assert np.array_equal(model.predict_forces(data[0], **given), forces)
        assert np.array_equal(model.predict_uncertainty_forces(data[0], **given), slope)
    assert np.abs(forces - model.predict_forces_central(data[0])).max() < 1e-3 * np.abs(forces).max()
    assert model.predict_energy(data[:2])[0] == energy[0]
    data[0].calc = model
    assert data[0].get_potential_energy() == energy[0]
    assert model.get_property("uncertainty") == sigma[0]
    features = model.fitted.features(Batch.from_ase(data[:2]))
    covariance = model.kernel(features, features)
    assert covariance[0, 0] == pytest.approx(covariance[1, 1]) and 0 < covariance[0, 1] < covariance[0, 0]

    model.save(str(tmp_path / "model.h5"))
    other = GPRModel()
    other.load(str(tmp_path / "model.h5"))
    assert other.predict_energy(data[1]) == model.predict_energy(data[1])
    copy = pickle.loads(pickle.dumps(model.learned))
    assert copy.fitted.predict(Batch.from_ase(data[1]))[0] == model.predict_energy(data[1])
    with pytest.raises(ConfigurationError, match="1 of 2 structures to learn have no energy"):
        model.train([data[1], Atoms("Au4Ni4", data[1].positions, cell=[12.0] * 3)])


@with_agox
def test_relaxation_keeps_template_and_box():
    from agox.candidates import StandardCandidate
    from agox.environments import Environment
    from thalweg.agox_adapter import GPRModel, RelaxPostprocess

    template = Atoms("Ni2", [[5.0, 6.0, 1.5], [7.0, 6.0, 1.5]], cell=[12.0] * 3)
    environment = Environment(
        template=template, symbols="Au4Ni4", confinement_cell=5.2 * np.eye(3), confinement_corner=np.full(3, 3.4),
        print_report=False,
    )  # fmt: skip
    data = clusters(12, template)
    candidates = [StandardCandidate.from_atoms(environment.get_template(), atoms) for atoms in data]
    for candidate, atoms in zip(candidates, data, strict=True):
        candidate.calc = atoms.calc
    model = GPRModel()
    model.train(candidates)
    assert np.array_equal(model.learned.data.fixed.sum(axis=0), [24] * 3)
    before = [model.predict_energy(atoms) for atoms in data[:3]]
    relaxed = RelaxPostprocess(model, environment, kappa=0.0, threads=1).process_list(candidates[:3])
    for candidate, energy in zip(relaxed, before, strict=True):
        assert np.array_equal(candidate.positions[:2], template.positions)
        assert np.all((candidate.positions[2:] > 3.39) & (candidate.positions[2:] < 8.61))
        assert candidate.get_potential_energy() < energy
