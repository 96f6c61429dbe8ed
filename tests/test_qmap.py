"""The Q-map of ASLA against PyTorch's convolutions in float64, and what the binding checks."""

import numpy as np
import pytest
from thalweg import _core
from thalweg.errors import ConfigurationError

METHODS = ["direct", "local_fft", "grid_fft"]

# kernels, dilations, species, width of the representation, shape, periodic
CASES = {
    "2D, periodic": ([15] * 4, [1] * 4, 1, 7, (41, 36), (True, True)),
    "2D, three species, open": ([9] * 4, [1] * 4, 3, 7, (31, 29), (False, False)),
    "2D, a dilation per layer": ([3, 5, 7, 3], [2, 3, 1, 2], 2, 3, (23, 30), (True, False)),
    "3D, d = 1": ([5, 3, 5, 3], [1] * 4, 2, 3, (14, 13, 15), (True, False, True)),
    "3D, d = 2": ([5, 3, 5, 3], [2] * 4, 2, 5, (17, 16, 18), (True, True, False)),
    "3D, d = 3": ([3] * 4, [3] * 4, 2, 3, (20, 19, 21), (False, False, False)),
}


def arrays(kernels, species, width, dimension, seed=0):
    """Weights and biases of a 10-10-10 network, the kernel and bias of a representation, all float32."""
    rng = np.random.default_rng(seed)
    channels = [species, 10, 10, 10, species]
    weights = [
        rng.normal(scale=np.sqrt(2 / (i * k**dimension)), size=(o, i) + (k,) * dimension).astype(np.float32)
        for k, i, o in zip(kernels, channels, channels[1:], strict=False)
    ]
    biases = [rng.normal(scale=0.1, size=o).astype(np.float32) for o in channels[1:]]
    kernel = rng.normal(scale=0.5, size=(species, species) + (width,) * dimension).astype(np.float32)
    return weights, biases, kernel, rng.normal(scale=0.1, size=species).astype(np.float32)


def torch_q(torch, weights, biases, dilations, kernel, bias, shape, periodic, species, voxels):
    """Q (species, *shape) by torch.nn.functional in float64; directions are padded one after the other."""
    convolve = torch.nn.functional.conv2d if len(shape) == 2 else torch.nn.functional.conv3d
    tensor = lambda a: torch.from_numpy(np.asarray(a, dtype=np.float64))  # noqa: E731

    def layer(x, weight, shift, dilation):
        reach = weight.shape[-1] // 2 * dilation
        for axis, n in enumerate(shape):
            index = torch.arange(-reach, n + reach)
            outside = (index < 0) | (index >= n)
            x = x.index_select(axis + 2, index % n)
            if not periodic[axis]:
                keep = (~outside).double().reshape([-1 if a == axis else 1 for a in range(len(shape))])
                x = x * keep
        return convolve(x, weight, shift, dilation=dilation)

    occupied = np.zeros((1, kernel.shape[1], *shape))
    np.add.at(occupied.reshape(kernel.shape[1], -1), (species, voxels), 1.0)
    # Layers correlate, an atom spreads its kernel: turned round.
    turned = np.flip(kernel, axis=tuple(range(2, kernel.ndim))).copy()
    x = layer(tensor(occupied), tensor(turned), tensor(bias), 1)
    for k, (weight, shift, dilation) in enumerate(zip(weights, biases, dilations, strict=True)):
        x = layer(x, tensor(weight), tensor(shift), dilation)
        x = torch.nn.functional.leaky_relu(x, 0.01) if k + 1 < len(weights) else torch.tanh(x)
    return x[0].numpy()


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name):
    torch = pytest.importorskip("torch")
    kernels, dilations, n_species, width, shape, periodic = CASES[name]
    weights, biases, kernel, bias = arrays(kernels, n_species, width, len(shape))
    net = _core.QNetwork(weights, biases, dilations=dilations, representation=kernel, representation_bias=bias)
    q_map = _core.QMap(net, shape, periodic)
    rng = np.random.default_rng(1)
    species, voxels = rng.integers(0, n_species, 6), rng.integers(0, q_map.voxels, 6)
    expected = torch_q(torch, weights, biases, dilations, kernel, bias, shape, periodic, species, voxels)
    assert 0.03 < np.abs(expected).max() < 0.9999
    np.testing.assert_allclose(q_map.dense(species, voxels), expected, rtol=0, atol=3e-6)
    both = q_map.batch([0, 6, 6], species, voxels, threads=1)
    np.testing.assert_allclose(both[0], expected, rtol=0, atol=3e-6)
    for method in METHODS:
        state = _core.QState(q_map, method)
        for s, v in zip(species, voxels, strict=True):
            state.place(s, v)
        np.testing.assert_allclose(state.q(), expected, rtol=0, atol=3e-6, err_msg=method)


def small_map():
    weights, biases, kernel, bias = arrays([3, 3, 3, 3], 2, 3, 2)
    net = _core.QNetwork(weights, biases, dilations=[1, 1, 1, 1], representation=kernel, representation_bias=bias)
    return _core.QMap(net, (11, 12), (True, False))


@pytest.mark.parametrize("method", METHODS)
def test_expand_apply_undo(method):
    q_map = small_map()
    state = _core.QState(q_map, method)
    assert state.method == method
    state.place(0, 40)
    before = state.q()
    delta = state.expand(1, 70)
    assert (delta.species, delta.voxel) == (1, 70) and delta.nbytes > 0
    np.testing.assert_array_equal(state.q(), before)
    state.apply(delta)
    after = state.q()
    np.testing.assert_allclose(after, q_map.dense([0, 1], [40, 70]), rtol=0, atol=3e-6)
    assert state.species.tolist() == [0, 1] and state.voxels.tolist() == [40, 70]
    shell = np.array([5, 3, 131])
    np.testing.assert_array_equal(state.q(shell), after.reshape(2, -1)[:, shell])
    state.undo()
    np.testing.assert_array_equal(state.q(), before)
    state.apply(delta)  # a change can be used again
    np.testing.assert_array_equal(state.q(), after)
    state.apply(state.retract())
    np.testing.assert_array_equal(state.q(), after)


def test_batch_is_the_same_for_any_number_of_threads():
    q_map = small_map()
    rng = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 6, 23))])
    species, voxels = rng.integers(0, 2, offsets[-1]), rng.integers(0, q_map.voxels, offsets[-1])
    one = q_map.batch(offsets, species, voxels, threads=1)
    assert one.shape == (23, 2, 11, 12) and one.dtype == np.float32
    np.testing.assert_array_equal(q_map.batch(offsets, species, voxels, threads=2), one)


def test_one_hot_is_the_default():
    weights, biases, _, _ = arrays([3] * 4, 2, 1, 2)
    weights, biases = [weights[0], weights[3]], [biases[0], biases[3]]
    net = _core.QNetwork(weights, biases, dilations=[1, 2])
    explicit = _core.QNetwork(weights, biases, dilations=[1, 2], representation=np.eye(2).reshape(2, 2, 1, 1))
    grid = (9, 8), (True, True)
    np.testing.assert_array_equal(_core.QMap(net, *grid).dense([1], [30]), _core.QMap(explicit, *grid).dense([1], [30]))


def test_published_weight_counts():
    count = lambda dimension, k, s: _core.q_weight_count(dimension, [s, 10, 10, 10, s], [k] * 4)  # noqa: E731
    assert [count(2, 15, 1), count(3, 11, 2), count(3, 7, 2), count(3, 5, 2)] == [49_531, 319_472, 82_352, 30_032]
    assert _core.q_receptive_radius([7] * 4, [2] * 4) == 24


def test_what_is_refused():
    weights, biases, kernel, bias = arrays([3, 3, 3, 3], 2, 3, 2)
    ones = [1, 1, 1, 1]
    with pytest.raises(ConfigurationError, match="one entry per layer"):
        _core.QNetwork(weights, biases, dilations=[1])
    with pytest.raises(ConfigurationError, match="equally long"):
        _core.QNetwork([weights[0][..., :2], *weights[1:]], biases, dilations=ones)
    with pytest.raises(ConfigurationError, match="layer 2 must have 10 inputs"):
        _core.QNetwork([weights[0], weights[0], *weights[2:]], [biases[0], biases[0], *biases[2:]], dilations=ones)
    with pytest.raises(ConfigurationError, match=r"representation_bias must have shape \(2\)"):
        _core.QNetwork(weights, biases, dilations=ones, representation=kernel, representation_bias=bias[:1])
    q_map = small_map()
    with pytest.raises(ConfigurationError, match="method must be"):
        _core.QState(q_map, "fast")
    with pytest.raises(ConfigurationError, match="voxels of this grid are 0 to 131"):
        q_map.dense([0], [132])
    with pytest.raises(ConfigurationError, match="offsets must rise"):
        q_map.batch([0, 3, 1], [0], [0])
    with pytest.raises(ConfigurationError, match="no atom is placed"):
        _core.QState(q_map).undo()
