"""Q-networks: representations, published sizes, patches against whole grids, gradients, training, snapshots."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from thalweg.errors import ConfigurationError

torch = pytest.importorskip("torch")
from thalweg.networks import (  # noqa: E402
    AGR,
    PRESETS,
    CircularHarmonics,
    DisplacedGaussians,
    Gaussian,
    OneHot,
    QNetwork,
    Trainer,
)

torch.set_num_threads(1)

REPRESENTATIONS = [
    lambda s, d: OneHot(s, d),
    lambda s, d: Gaussian(s, d, width=1.25, bias=-0.1),
    lambda s, d: Gaussian(s, d, width=[1.0, 1.5, 0.8][:s]),
    lambda s, d: AGR(s, d, seed=3),
    lambda s, d: DisplacedGaussians(s, d, initial="falling", seed=4),
    lambda s, d: CircularHarmonics(s, d, radius=0.8),
]
GRIDS = [
    ((13, 10), (True, True)),
    ((11, 14), (False, True)),
    ((12, 9), (False, False)),
    ((7, 8, 6), (True, False, False)),
]


def pairs(shape, species, n, seed=0, atoms=6):
    """Random state-action pairs: placed, offsets, actions, targets."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, atoms, n)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    voxels = int(np.prod(shape))
    placed = np.stack([rng.integers(0, species, offsets[-1]), rng.integers(0, voxels, offsets[-1])], 1).astype(np.int32)
    actions = np.stack([rng.integers(0, species, n), rng.integers(0, voxels, n)], 1).astype(np.int32)
    return placed, offsets, actions, rng.uniform(-1, 1, n).astype(np.float32)


def maps(network, placed, offsets, actions):
    """Q of the actions from whole grids, with a graph."""
    q = network(network.one_hot(placed, offsets)).flatten(2)
    return q[
        torch.arange(len(actions)),
        torch.from_numpy(actions[:, 0].astype(int)),
        torch.from_numpy(actions[:, 1].astype(int)),
    ]


@pytest.mark.parametrize(
    ("name", "species", "weights", "radius"),
    [
        ("thesis-2d", 1, 49_531, 28),
        ("thesis-3d-full", 2, 319_472, 20),
        ("thesis-3d-dilated-2", 2, 82_352, 24),
        ("thesis-3d-dilated-3", 2, 30_032, 24),
        ("light-3d", 2, 82_196, 13),
    ],
)
def test_presets_have_the_published_numbers_of_weights(name, species, weights, radius):
    network = QNetwork.preset(name, species=species)
    assert network.convolution_weights == weights and network.receptive_radius == radius
    assert set(PRESETS) >= {name}


@pytest.mark.parametrize("periodic", [(True, True), (False, True), (False, False)])
def test_gaussian_is_the_sum_of_its_atoms(periodic):
    shape, rng = (9, 31), np.random.default_rng(1)
    image = torch.zeros(1, 2, *shape, dtype=torch.float64)
    atoms = [(s, int(rng.integers(9)), int(rng.integers(31))) for s in (0, 0, 1)]
    expected = np.full((2, *shape), -0.1)
    for s, y, x in atoms:
        image[0, s, y, x] = 1
        for dy in range(-12, 13):
            for dx in range(-12, 13):
                place = [y + dy, x + dx]
                for axis in (0, 1):
                    if periodic[axis]:
                        place[axis] %= shape[axis]
                if 0 <= place[0] < shape[0] and 0 <= place[1] < shape[1]:
                    width = [1.25, 1.5][s]
                    expected[s, place[0], place[1]] += np.exp(-(dy * dy + dx * dx) / (2 * width**2))
    came = Gaussian(2, 2, width=[1.25, 1.5], bias=-0.1).double()(image, periodic)[0].numpy()
    assert np.abs(came - expected).max() < 1e-6  # kernels are kept in float32


@pytest.mark.parametrize("make", REPRESENTATIONS)
@pytest.mark.parametrize(("shape", "periodic"), GRIDS)
def test_patches_are_the_whole_grid(make, shape, periodic):
    """Receptive fields larger than the grid, walls and images: one value of a patch is that of the map."""
    dimension = len(shape)
    for kernel, dilation in ((3, 1), (3, 2), (3, (1, 2, 4, 6)), (5, 1)):
        network = QNetwork(
            make(2, dimension), kernel=kernel, dilation=dilation, hidden=4, initial="uniform", seed=2
        ).double().on(shape, periodic)  # fmt: skip
        placed, offsets, actions, _ = pairs(shape, 2, 5)
        network.update_statistics(placed, offsets)
        with torch.no_grad():
            expected = maps(network, placed, offsets, actions)
            assert (network.q_of(placed, offsets, actions) - expected).abs().max() < 1e-12
            if dilation in (1, 2):
                assert (network.q_of(placed, offsets, actions, fft=True) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("make", REPRESENTATIONS)
def test_gradients_are_those_of_the_whole_grid_and_of_differences(make):
    shape, periodic = (9, 11), (False, True)
    network = QNetwork(make(2, 2), kernel=3, hidden=3, initial="uniform", seed=5).double().on(shape, periodic)
    placed, offsets, actions, targets = pairs(shape, 2, 6)
    network.update_statistics(placed, offsets)
    aim, parameters = torch.from_numpy(targets).double(), list(network.parameters())

    def loss(q):
        return ((q - aim) ** 2).mean()

    ours = torch.autograd.grad(loss(network.q_of(placed, offsets, actions)), parameters)
    whole = torch.autograd.grad(loss(maps(network, placed, offsets, actions)), parameters)
    for a, b in zip(ours, whole, strict=True):
        assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())
    rng, slope = np.random.default_rng(0), 0.0
    with torch.no_grad():
        directions = [torch.from_numpy(rng.normal(size=tuple(p.shape))) for p in parameters]
        values = []
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p += sign * 1e-6 * d
            values.append(float(loss(network.q_of(placed, offsets, actions))))
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * 1e-6 * d
        slope = sum(float((g * d).sum()) for g, d in zip(ours, directions, strict=True))
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-7 * (1 + abs(slope))


@pytest.mark.parametrize("dimension", [2, 3])
def test_circular_harmonics_do_not_see_rotations(dimension):
    """Turning the atoms by 90 degrees turns the images."""
    representation = CircularHarmonics(1, dimension, radius=0.8, orders=(0, 1, 2, 3)).double()
    shape = (21,) * dimension
    image = torch.zeros(1, 1, *shape, dtype=torch.float64)
    for place in ((8, 9, 10), (11, 12, 8), (10, 7, 11)):
        image[(0, 0, *place[:dimension])] = 1
    open_ = (False,) * dimension
    turned = representation(torch.rot90(image, 1, (2, 3)), open_)
    assert (turned - torch.rot90(representation(image, open_), 1, (2, 3))).abs().max() < 1e-6


def test_normalised_representations_see_the_same_in_training_and_building():
    """Running statistics of whole grids, updated once per step: after each step Q of patches is Q of the map."""
    shape, periodic = (12, 13), (True, False)
    network = QNetwork(AGR(2, 2, seed=1, l1=0.01), kernel=3, seed=1)
    trainer = Trainer(network, shape, periodic)
    placed, offsets, actions, targets = pairs(shape, 2, 9)
    before = network.representation.running_mean.clone()
    for step in range(3):
        trainer.step(placed, offsets, actions, targets)
        assert int(network.representation.seen) == step + 1
        patches = trainer.q_of(placed, offsets, actions)
        for i in range(len(actions)):
            q = trainer.q_map(placed[offsets[i] : offsets[i + 1]]).reshape(2, -1)
            assert abs(q[tuple(actions[i])] - patches[i]) < 1e-5
    assert not torch.equal(before, network.representation.running_mean)
    # the first step starts from what it sees: mean 0, variance 1 over the grids of the batch
    fresh = AGR(2, 2, seed=1)
    again = QNetwork(fresh, kernel=3).on(shape, periodic)
    again.update_statistics(placed, offsets)
    images = fresh.finish(again.fields(placed, offsets)).transpose(0, 1).flatten(1)
    assert images.mean(1).abs().max() < 1e-5 and (images.var(1) - 1).abs().max() < 1e-2


def test_penalty_holds_coefficients_down():
    shape, periodic = (12, 13), (True, True)
    placed, offsets, actions, targets = pairs(shape, 1, 9)
    sums = []
    for l1 in (0.0, 0.1):
        representation = AGR(1, 2, seed=1, l1=l1)
        trainer = Trainer(QNetwork(representation, kernel=3, seed=1), shape, periodic, steps=20, lr=1e-2)
        trainer.step(placed, offsets, actions, targets)
        sums.append(float(representation.size_of_coefficients().detach()))
    assert sums[1] < sums[0] - 0.3


def test_adam_is_that_of_torch():
    shape, periodic = (10, 9), (True, True)
    data = pairs(shape, 1, 8)
    ours, theirs = (QNetwork(Gaussian(), kernel=3, seed=1) for _ in range(2))
    trainer = Trainer(ours, shape, periodic, backend="torch")
    optimiser = torch.optim.Adam(theirs.on(shape, periodic).parameters(), lr=1e-3)
    for _ in range(5):
        loss, q = trainer.step(*data)
        optimiser.zero_grad()
        value = theirs.q_of(*data[:3])
        error = torch.nn.functional.mse_loss(value, torch.from_numpy(data[3]))
        error.backward()
        optimiser.step()
        assert abs(loss - error.item()) < 1e-6 and np.abs(q - value.detach().numpy()).max() < 1e-5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-5


def test_training_learns_and_repeats_itself_from_a_snapshot():
    shape, periodic = (10, 11), (True, False)
    data = pairs(shape, 2, 12)

    def fresh(seed):
        return Trainer(QNetwork(AGR(2, seed=seed), kernel=3, seed=seed), shape, periodic)

    trainer = fresh(1)
    losses = [trainer.step(*data)[0] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    file = io.BytesIO()
    np.savez(file, **trainer.state_dict())
    file.seek(0)
    other = fresh(2)
    other.load_state_dict(dict(np.load(file, allow_pickle=False)))
    for _ in range(3):
        (loss, q), (loss_other, q_other) = trainer.step(*data), other.step(*data)
        assert loss == loss_other and np.array_equal(q, q_other)
    assert np.array_equal(trainer.parameters, other.parameters)
    with pytest.raises(ConfigurationError, match="another network"):
        Trainer(QNetwork(Gaussian(2), kernel=3), shape, periodic).load_state_dict(trainer.state_dict())


def test_weights_for_the_evaluator_give_the_same_images():
    shape, periodic = (10, 11), (True, True)
    trainer = Trainer(QNetwork(AGR(2, seed=1), kernel=3, seed=1), shape, periodic)
    placed, offsets, actions, targets = pairs(shape, 2, 4)
    trainer.step(placed, offsets, actions, targets)
    weights = trainer.weights()
    assert [weights[f"w{k}"].shape for k in (1, 2, 3, 4)] == [
        (10, 2, 3, 3),
        (10, 10, 3, 3),
        (10, 10, 3, 3),
        (2, 10, 3, 3),
    ]
    assert all(w.dtype == np.float32 for w in weights.values())
    kernels, half = weights["kernels"], weights["kernels"].shape[-1] // 2
    image = np.zeros((2, *shape)) + weights["shift"][:, None, None]
    for s, voxel in placed[: offsets[3]][offsets[2] :]:
        y, x = np.unravel_index(voxel, shape)
        for dy in range(-half, half + 1):
            for dx in range(-half, half + 1):
                image[s, (y + dy) % shape[0], (x + dx) % shape[1]] += kernels[s, dy + half, dx + half]
    one_hot = trainer.network.one_hot(placed[offsets[2] : offsets[3]], np.array([0, offsets[3] - offsets[2]]))
    with torch.no_grad():
        assert np.abs(trainer.network.representation(one_hot, periodic)[0].numpy() - image).max() < 1e-5


def test_wrong_input_is_told():
    shape, periodic = (6, 7), (True, True)
    network = QNetwork(Gaussian(), kernel=3)
    placed, offsets, actions, targets = pairs(shape, 1, 4)
    with pytest.raises(ConfigurationError, match="does not know its grid"):
        network.q_map(placed)
    trainer = Trainer(network, shape, periodic)
    for wrong, text in (
        ((placed[:, :1], offsets, actions, targets), "placed must be"),
        ((placed, offsets[:-1], actions, targets), "offsets must rise"),
        ((placed, offsets, actions[:-1], targets), "actions must be"),
        ((placed, offsets, actions + np.array([0, 42]), targets), "voxels 0 to 41"),
        ((placed, offsets, actions, targets[:-1]), "targets must be"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            trainer.step(*wrong)
    for make, text in (
        (lambda: QNetwork(Gaussian(), kernel=4), "odd kernel"),
        (lambda: QNetwork.preset("thesis-2D"), "Did you mean 'thesis-2d'"),
        (lambda: QNetwork.preset("thesis-3d-full", Gaussian()), "has 3 dimensions"),
        (lambda: QNetwork(Gaussian(), initial="hee"), "Did you mean 'he'"),
        (lambda: Gaussian(width=0.0), "above 0"),
        (lambda: DisplacedGaussians(initial="one"), "must be one of"),
        (lambda: CircularHarmonics(dimension=3, orders=(4,)), "up to 3"),
        (lambda: Trainer(network, (6,), (True,)), "2 entries each"),
        (lambda: Trainer(network, shape, periodic, backend="cuda"), "backend must be"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            make()


def test_initial_weights_follow_the_seed():
    a, b, c = (QNetwork(Gaussian(), kernel=5, seed=seed).weights[1].detach() for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(float(a.std()) / (2 / 250) ** 0.5 - 1) < 0.1
    uniform = QNetwork(Gaussian(), kernel=5, initial="uniform").weights[1]
    assert float(uniform.detach().abs().max()) <= 250**-0.5


def test_without_torch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None\ntry:\n import thalweg.networks\nexcept Exception as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'thalweg[asla]'" in out


CORE = [make for make in REPRESENTATIONS if make(2, 2).linear]


@pytest.mark.parametrize("make", CORE)
@pytest.mark.parametrize(("shape", "periodic"), GRIDS)
def test_the_core_has_the_gradient_of_float64(make, shape, periodic):
    """All gradients, those of trained representations too, against autograd in double precision."""
    dimension = len(shape)
    for kernel, dilation in ((3, 2), (5, 1)) if dimension == 2 else ((3, 1), (3, 2)):
        options = {"kernel": kernel, "dilation": dilation, "initial": "uniform", "seed": 2}
        network, double = (QNetwork(make(2, dimension), **options) for _ in range(2))
        trainer = Trainer(network, shape, periodic, backend="core", l1=0.01)
        data = pairs(shape, 2, 21)
        network.update_statistics(*data[:2])
        double.load_state_dict(network.state_dict())
        double.double().on(shape, periodic)
        loss, q, gradient = trainer.gradient(*data)
        wanted = double.q_of(*data[:3])
        error = ((wanted - torch.from_numpy(data[3])) ** 2).mean()
        if double.representation.size_of_coefficients() is not None:
            error = error + 0.01 * double.representation.size_of_coefficients()
        named = dict(double.named_parameters())
        expected = torch.autograd.grad(error, [named[name] for name in trainer._names])
        assert abs(loss - error.item()) < 1e-6 * error.item()
        assert np.abs(q - wanted.detach().numpy()).max() < 1e-5
        start = 0
        for name, part in zip(trainer._names, expected, strict=True):
            came = gradient[start : start + part.numel()].reshape(part.shape)
            start += part.numel()
            assert np.abs(came - part.numpy()).max() <= 1e-5 * max(np.abs(part.numpy()).max(), 1e-3), name


def test_core_and_torch_train_alike():
    shape, periodic = (12, 13), (True, False)
    data = pairs(shape, 2, 20)
    trainers = [
        Trainer(QNetwork(AGR(2, seed=1), kernel=5, seed=1), shape, periodic, backend=backend)
        for backend in ("core", "torch")
    ]
    for _ in range(10):
        (a, q_a), (b, q_b) = (trainer.step(*data) for trainer in trainers)
        assert abs(a - b) < 1e-4 and np.abs(q_a - q_b).max() < 2e-3
    assert np.abs(trainers[0].q_of(*data[:3]) - trainers[1].q_of(*data[:3])).max() < 5e-3


def test_threads_of_the_core_change_no_bit():
    shape, periodic = (12, 13), (False, True)
    data = pairs(shape, 2, 70)
    came = []
    for threads in (1, 2, 5):
        trainer = Trainer(QNetwork(AGR(2, seed=1), kernel=5, seed=1), shape, periodic, threads=threads)
        assert trainer.backend == "core"
        losses = [trainer.step(*data)[0] for _ in range(3)]
        came.append((losses, trainer.parameters.copy()))
    assert all(came[0][0] == losses and np.array_equal(came[0][1], p) for losses, p in came[1:])


def test_the_backend_follows_the_network():
    shape, periodic = (9, 9, 9), (True, True, True)
    assert Trainer(QNetwork(Gaussian(1, 3), kernel=3, dilation=2), shape, periodic).backend == "core"
    for network, text in (
        (QNetwork(CircularHarmonics(1, 3), kernel=3), "not linear"),
        (QNetwork.preset("light-3d"), "hidden channels"),
        (QNetwork(Gaussian(1, 3), kernel=3, dilation=(1, 2, 2, 3)), "dilation per layer"),
    ):
        assert Trainer(network, shape, periodic).backend == "torch"
        with pytest.raises(ConfigurationError, match=text):
            Trainer(network, shape, periodic, backend="core")


@pytest.mark.parametrize("backend", ["core", "torch"])
def test_a_saturated_network_still_learns(backend):
    network = QNetwork(Gaussian(1, 2), kernel=5, seed=1)
    with torch.no_grad():
        network.biases[-1].fill_(15.0)  # 1 - tanh(15)^2 is 4e-13
    trainer = Trainer(network, (13, 10), (True, True), lr=0.01, backend=backend)
    placed, offsets, actions, _ = pairs((13, 10), 1, 4, seed=5)
    before = trainer.q_of(placed, offsets, actions)
    for _ in range(200):
        trainer.step(placed, offsets, actions, np.full(4, -0.5, np.float32))
    assert np.all(before == 1.0)
    assert trainer.q_of(placed, offsets, actions).max() < 0.9


@pytest.mark.parametrize("kind", [Gaussian, CircularHarmonics])
def test_atoms_on_one_voxel_look_the_same_in_maps_and_in_training(kind):
    """Template atoms above one another share a voxel."""
    network = QNetwork.preset("thesis-2d", kind(1, 2), seed=1).on((12, 11), (True, False))
    placed = np.array([[0, 20], [0, 20], [0, 70]])
    q = network.q_of(placed, np.array([0, 3]), np.array([[0, 60]])).item()
    assert abs(network.q_map(placed).ravel()[60] - q) < 1e-5
    once = network.q_of(placed[1:], np.array([0, 2]), np.array([[0, 60]])).item()
    assert abs(once - q) > 1e-4


def test_displaced_gaussians_start_as_they_are_told():
    first, uniform, falling = (
        DisplacedGaussians(2, initial=kind, seed=4).coefficients.detach().numpy()
        for kind in ("first", "uniform", "falling")
    )
    assert np.array_equal(first, np.eye(7)[[0, 0]])
    assert np.abs(uniform).max() <= 1 and np.all(np.ptp(uniform, axis=1) > 0.5)
    assert np.allclose(falling, uniform * np.linspace(1.0, 0.1, 7))


def test_stacked_harmonics_are_normalised_by_whole_grids():
    """Paper II, Fig. 11; building and training see the same images."""
    network = QNetwork.preset("thesis-2d", CircularHarmonics(2, 2, radius=0.6), seed=1)
    trainer = Trainer(network, (14, 12), (True, False), lr=5e-4)
    assert trainer.backend == "torch"
    placed = np.array([[0, 5], [1, 40], [0, 90], [1, 100], [0, 33]], np.int32)
    offsets, actions, targets = (
        np.array([0, 2, 5]),
        np.array([[0, 60], [1, 61]], np.int32),
        np.array([0.5, -0.5], np.float32),
    )
    before = trainer.parameters.copy()
    losses = [trainer.step(placed, offsets, actions, targets)[0] for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0] and not np.array_equal(before, trainer.parameters)
    representation = network.representation
    images = representation.images(network.fields(placed, offsets)).detach().numpy()
    assert np.allclose(representation.running_mean, images.mean(axis=(0, 2, 3)), rtol=1e-4)
    assert np.allclose(representation.running_variance, images.var(axis=(0, 2, 3)), rtol=1e-3)
    q = [
        trainer.q_map(placed[a:b]).reshape(2, -1)[tuple(action)]
        for a, b, action in zip([0, 2], [2, 5], actions, strict=True)
    ]
    assert np.allclose(q, trainer.q_of(placed, offsets, actions), atol=1e-5)
    # ... and a snapshot holds the statistics
    other = Trainer(QNetwork.preset("thesis-2d", CircularHarmonics(2, 2, radius=0.6), seed=7), (14, 12), (True, False))
    other.load_state_dict(trainer.state_dict())
    assert np.array_equal(other.q_of(placed, offsets, actions), trainer.q_of(placed, offsets, actions))
