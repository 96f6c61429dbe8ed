"""Q-networks that place atoms on a grid, and their training (PyTorch; `pip install 'thalweg[asla]'`).

A network is a *representation*, which turns the grid of placed atoms into images, and four convolutions (Meldgaard,
Mortensen, Jorgensen, Hammer, J. Phys.: Condens. Matter 32, 404005 (2020); representations: Paper II of the thesis).
State-action pairs travel as four arrays; state i is the atoms placed[offsets[i]:offsets[i + 1]]:

    placed   (m, 2) int32    species index, voxel (flat index into the grid, C order)
    offsets  (n + 1) int64
    actions  (n, 2) int32    species index, voxel
    targets  (n) float32

    network = QNetwork.preset("thesis-2d", Gaussian(species=1, bias=-0.1), seed=1)
    trainer = Trainer(network, (41, 36), (True, True))
    loss, q = trainer.step(placed, offsets, actions, targets)
    q = trainer.q_map(placed)                # (species, 41, 36)

Q of an action needs its surroundings only, so training looks at patches: the lattice of points that reach the action
through the layers. Open directions are padded with zeros before every layer, periodic ones wrap around.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, nearest
from thalweg.randomness import Key

try:
    import torch
    from torch import Tensor
    from torch.nn import functional
except ImportError as error:
    raise ConfigurationError(
        "thalweg.networks needs PyTorch, which is not there; install it: pip install 'thalweg[asla]'"
    ) from error

__all__ = [
    "AGR", "PRESETS", "CircularHarmonics", "DisplacedGaussians", "Gaussian", "OneHot", "QNetwork", "Representation",
    "Trainer",
]  # fmt: skip

Array = np.ndarray

# Published sizes (thesis ch. 5 and 6 print the numbers of weights, which fix the kernels), and a cheaper one of ours.
PRESETS: dict[str, dict[str, Any]] = {
    "thesis-2d": {"dimension": 2, "kernel": 15, "dilation": 1, "hidden": 10},
    "thesis-3d-full": {"dimension": 3, "kernel": 11, "dilation": 1, "hidden": 10},
    "thesis-3d-dilated-2": {"dimension": 3, "kernel": 7, "dilation": 2, "hidden": 10},
    "thesis-3d-dilated-3": {"dimension": 3, "kernel": 5, "dilation": 3, "hidden": 10},
    "light-3d": {"dimension": 3, "kernel": 3, "dilation": (1, 2, 4, 6), "hidden": 38},
}
LAYERS = 4
# What the derivative of tanh counts for at least, here and in training.cpp: at the true one, a network that has run into
# saturation never leaves it.
LEAST_SLOPE = 1e-3
# States whose images give the statistics of a normalised representation in one step.
STATISTICS_STATES = 16


def _window(reach: float, dimension: int, lattice: Array | None) -> int:
    """Half extent of a kernel that is to hold so many spacings: at least 25 x 25 in the plane (Paper II). Skewed windows
    are narrower across than along."""
    narrow = 1.0 if lattice is None else float(np.linalg.norm(np.linalg.inv(lattice), axis=0).max())
    return math.ceil(narrow * max(12.0 if dimension == 2 else 1.0, reach) - 1e-9)


def _offsets(half: int, dimension: int, lattice: Array | None = None) -> Array:
    """(dimension, 2 half + 1, ...) where the voxels of a kernel lie from its middle, in grid spacings; lattice (dimension,
    dimension): the steps along the directions of a skewed grid, in spacings."""
    offsets = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * dimension, indexing="ij"))
    return offsets if lattice is None else np.einsum("i...,ij->j...", offsets, np.asarray(lattice, float))


def _radius(half: int, dimension: int, lattice: Array | None = None) -> Array:
    return np.sqrt((_offsets(half, dimension, lattice) ** 2).sum(0))


def _tensor(values: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)


# ---- representations -------------------------------------------------------------------------------------------


class Representation(torch.nn.Module):
    """One-hot images of the placed atoms, one per species, turned into `channels` images.

    What all of them share: each species' image is convolved with one or more kernels (`kernels`), and the fields are
    combined point by point (`finish`). A subclass with linear = True has one kernel per species and
    finish(fields) = scale * fields + shift. `lattice` (dimension, dimension) of those with a width: the steps along the
    directions of a skewed grid, in spacings, so that what is round stays round; None: at right angles.

    Parameters
    ----------
    species : int
    dimension : 2 or 3
    """

    linear = True

    def __init__(self, species: int = 1, dimension: int = 2):
        super().__init__()
        if dimension not in (2, 3) or species < 1:
            raise ConfigurationError(
                f"a representation needs species >= 1 and dimension 2 or 3, but they are {species} and {dimension}"
            )
        self.species, self.dimension = int(species), int(dimension)

    @property
    def channels(self) -> int:
        return self.species

    def kernels(self) -> Tensor:
        """(species, fields, *window), odd windows; voxel offsets run along the last axes."""
        raise NotImplementedError

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(channels,) each."""
        one = self.kernels().new_ones(self.channels)
        return one, torch.zeros_like(one)

    def images(self, fields: Tensor) -> Tensor:
        """(n, species, fields, ...) -> (n, channels, ...), before scale and shift."""
        return fields[:, :, 0]

    def finish(self, fields: Tensor) -> Tensor:
        """(n, species, fields, ...) -> (n, channels, ...), point by point."""
        images = self.images(fields)
        scale, shift = (part.to(images).view(-1, *(1,) * (images.dim() - 2)) for part in self.scale_and_shift())
        return images * scale + shift

    def effective(self) -> tuple[Tensor, Tensor]:
        """A linear representation as kernels (species, *window) and a constant (species,)."""
        scale, shift = self.scale_and_shift()
        kernels = self.kernels()[:, 0]
        return kernels * scale.view((-1,) + (1,) * self.dimension), shift

    def size_of_coefficients(self) -> Tensor | None:
        """Sum of the absolute values that an L1 penalty holds down; None if there are none."""
        return None

    def see(self, mean: Array, variance: Array) -> None:
        """Takes note of the mean and variance (channels,) of images of whole grids, before they are normalised; for
        normalised representations."""

    @property
    def needs_statistics(self) -> bool:
        return False

    def forward(self, one_hot: Tensor, periodic: Sequence[bool]) -> Tensor:
        """(n, species, *grid) -> (n, channels, *grid); periodic directions wrap, in open ones nothing lies beyond."""
        kernels = self.kernels().to(one_hot.dtype)
        grid, window = one_hot.shape[2:], kernels.shape[2:]
        size = [n if p else n + w - 1 for n, w, p in zip(grid, window, periodic, strict=True)]
        folded = kernels.new_zeros(kernels.shape[0] * kernels.shape[1], math.prod(size))
        index = np.zeros(window, np.int64)
        for axis, (n, w) in enumerate(zip(size, window, strict=True)):
            shape = [1] * len(window)
            shape[axis] = w
            index = index * n + ((np.arange(w) - w // 2) % n).reshape(shape)
        folded = folded.index_add(1, torch.from_numpy(index.ravel()), kernels.reshape(folded.shape[0], -1))
        folded = folded.view(*kernels.shape[:2], *size)
        axes = tuple(range(-len(size), 0))
        images = torch.fft.rfftn(one_hot, s=size, dim=axes).unsqueeze(2)
        fields = torch.fft.irfftn(images * torch.fft.rfftn(folded, dim=axes), s=size, dim=axes)
        return self.finish(fields[(..., *[slice(n) for n in grid])])


class OneHot(Representation):
    """1 where an atom is, else 0."""

    def __init__(self, species: int = 1, dimension: int = 2):
        super().__init__(species, dimension)
        self.register_buffer("kernel", torch.ones((species, 1) + (1,) * dimension), persistent=False)

    def kernels(self) -> Tensor:
        return self.get_buffer("kernel")


class Gaussian(Representation):
    """exp(-r^2 / 2 width^2) around each atom, plus a constant.

    Parameters
    ----------
    width : float or one per species (by atomic number), in grid spacings
    bias : float
        -0.1 helped in Paper II, +0.1 hurt.
    """

    def __init__(
        self, species: int = 1, dimension: int = 2, *, width: float | Sequence[float] = 1.25, bias: float = 0.0,
        lattice: Array | None = None,
    ):  # fmt: skip
        super().__init__(species, dimension)
        if np.ndim(width) > 1 or np.size(width) not in (1, species):
            raise ConfigurationError(f"width must be one number, or one per species ({species}), got {width}")
        widths = np.broadcast_to(np.asarray(width, float), (species,))
        if not np.all(widths > 0):
            raise ConfigurationError(f"width must be above 0 grid spacings, got {width}")
        if not math.isfinite(bias):
            raise ConfigurationError(f"bias must be a number, got {bias}")
        r = _radius(_window(4 * float(widths.max()), dimension, lattice), dimension, lattice)
        kernel = np.stack([np.exp(-(r**2) / (2 * w**2))[None] for w in widths])
        self.register_buffer("kernel", torch.from_numpy(kernel).float(), persistent=False)
        self.bias = float(bias)

    def kernels(self) -> Tensor:
        return self.get_buffer("kernel")

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        one = self.kernels().new_ones(self.species)
        return one, self.bias * one


class _Normalised(Representation):
    """Batch normalised if asked.

    Normalisation uses running statistics *in training, too*: they are those of images of whole grids, updated once
    before each step (`see`), so that patches in training and maps in building go through the very same network. The
    statistics of the patches themselves would differ: patches lie where atoms are.
    """

    momentum, epsilon = 0.1, 1e-5

    def __init__(self, species: int, dimension: int, *, channels: int, normalise: bool):
        super().__init__(species, dimension)
        self.normalise = normalise
        if normalise:
            self.gain = torch.nn.Parameter(torch.ones(channels))
            self.shift = torch.nn.Parameter(torch.zeros(channels))
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_variance", torch.ones(channels))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        if not self.normalise:
            return super().scale_and_shift()
        scale = self.gain / torch.sqrt(self.get_buffer("running_variance") + self.epsilon)
        return scale, self.shift - scale * self.get_buffer("running_mean")

    @property
    def needs_statistics(self) -> bool:
        return self.normalise

    @torch.no_grad()
    def see(self, mean: Array, variance: Array) -> None:
        seen = self.get_buffer("seen")
        part = 1.0 if int(seen) == 0 else self.momentum  # the first step starts from what it sees
        seen += 1
        for name, values in (("running_mean", mean), ("running_variance", variance)):
            buffer = self.get_buffer(name)
            buffer.lerp_(torch.from_numpy(values).to(buffer), part)


class _Trained(_Normalised):
    """K(r) = sum_i c_i basis_i(r), one set of trained coefficients per species."""

    def __init__(self, basis: Array, coefficients: Array, species: int, dimension: int, *, normalise: bool):
        super().__init__(species, dimension, channels=species, normalise=normalise)
        self.register_buffer("basis", torch.from_numpy(basis).float(), persistent=False)
        self.coefficients = torch.nn.Parameter(torch.from_numpy(coefficients).float())

    def kernels(self) -> Tensor:
        return torch.einsum("si,i...->s...", self.coefficients, self.get_buffer("basis")).unsqueeze(1)

    def size_of_coefficients(self) -> Tensor:
        return self.coefficients.abs().sum()


class AGR(_Trained):
    """Automated Gaussian representation (Paper II, sec. V): Gaussians of widths 1/3, 2/3, ... 3 spacings, trained
    coefficients from [0, 0.5], batch normalised.

    Parameters
    ----------
    l1 : float
        beta_1 of the penalty beta_1 sum |c_i| that Trainer adds to the loss; Paper II: 0, 0.01, 0.1.
    seed : int
    """

    def __init__(
        self, species: int = 1, dimension: int = 2, *, l1: float = 0.0, seed: int = 0, normalise: bool = True,
        lattice: Array | None = None,
    ):  # fmt: skip
        widths = np.arange(1, 10) / 3
        r = _radius(_window(12.0, dimension, lattice), dimension, lattice)
        basis = np.stack([np.exp(-(r**2) / (2 * w**2)) for w in widths])
        if not l1 >= 0:
            raise ConfigurationError(f"l1 must be at least 0, got {l1}")
        drawn = Key.of(seed).fold("representation").rng().uniform(0, 0.5, (species, len(widths)))
        super().__init__(basis, drawn, species, dimension, normalise=normalise)
        self.l1 = float(l1)


class DisplacedGaussians(_Trained):
    """Rings exp(-(r - r_i)^2 / 2 width^2), r_i = 0, 2, ... 12 spacings, with trained coefficients (Paper II, sec. VI).

    Parameters
    ----------
    initial : "uniform" from [-1, 1] | "falling": the same under an envelope from 1 to 0.1 | "first": c_0 = 1, others 0
    width : float, in grid spacings
    """

    def __init__(
        self, species: int = 1, dimension: int = 2, *, initial: str = "first", width: float = 1.0, seed: int = 0,
        normalise: bool = True, lattice: Array | None = None,
    ):  # fmt: skip
        if not width > 0:
            raise ConfigurationError(f"width must be above 0 grid spacings, got {width}")
        radii = 2.0 * np.arange(7)
        r = _radius(_window(12.0, dimension, lattice), dimension, lattice)
        basis = np.stack([np.exp(-((r - r_i) ** 2) / (2 * width**2)) for r_i in radii])
        drawn = Key.of(seed).fold("representation").rng().uniform(-1, 1, (species, len(radii)))
        if initial == "falling":
            drawn = drawn * np.linspace(1.0, 0.1, len(radii))
        elif initial == "first":
            drawn = np.zeros_like(drawn)
            drawn[:, 0] = 1.0
        elif initial != "uniform":
            kinds = ("uniform", "falling", "first")
            raise ConfigurationError(
                f"initial must be one of {', '.join(kinds)}, got '{initial}'.{nearest(initial, kinds)}"
            )
        super().__init__(basis, drawn, species, dimension, normalise=normalise)


class CircularHarmonics(_Normalised):
    """|K_m * image|^2 with K_m = exp(-(r - r_s)^2 / 2 width^2) exp(i m theta) (Paper II (5)-(8)); in space the power
    spectrum over the real spherical harmonics of degree m. Not linear: several atoms at the distance r_s interfere.

    Parameters
    ----------
    orders : which m, each one image per species
    radius : r_s, angstrom
    spacing : of the grid, angstrom
    width : float, in grid spacings
    stacked : bool
        With the image of a Gaussian of 1.5 spacings in front (Paper II, Fig. 11), (1 + orders) images per species.
    normalise : bool
        Every image is batch normalised, as there.
    """

    linear = False

    def __init__(
        self, species: int = 1, dimension: int = 2, *, orders: Sequence[int] = (0, 1, 2, 3), radius: float = 1.4,
        spacing: float = 0.2, width: float = 1.0, stacked: bool = True, normalise: bool = True,
        lattice: Array | None = None,
    ):  # fmt: skip
        super().__init__(species, dimension, channels=species * (len(orders) + stacked), normalise=normalise)
        if not orders or min(orders) < 0 or (dimension == 3 and max(orders) > 3):
            raise ConfigurationError(
                f"orders must be whole numbers from 0 (in three dimensions up to 3), at least one, got {tuple(orders)}"
            )
        for name, value in (("radius", radius), ("spacing", spacing), ("width", width)):
            if not value > 0:
                raise ConfigurationError(f"the {name} of circular harmonics must be above 0, got {value}")
        self.orders, self.stacked = tuple(int(m) for m in orders), bool(stacked)
        centre = radius / spacing
        half = _window(centre + 4 * width, dimension, lattice)
        offsets, r = _offsets(half, dimension, lattice), _radius(half, dimension, lattice)
        ring = np.exp(-((r - centre) ** 2) / (2 * width**2))
        kernels, order = [], []
        if stacked:
            kernels.append(np.exp(-(r**2) / (2 * 1.5**2)))
            order.append(-1)
        for m in self.orders:
            for harmonic in _harmonics(m, offsets, r):
                kernels.append(ring * harmonic)
                order.append(m)
        kernel = np.broadcast_to(np.stack(kernels), (species, len(kernels), *r.shape))
        self.register_buffer("kernel", torch.from_numpy(kernel.copy()).float(), persistent=False)
        self._groups = [[k for k, o in enumerate(order) if o == m] for m in self.orders]

    @property
    def channels(self) -> int:
        return self.species * (len(self.orders) + self.stacked)

    def kernels(self) -> Tensor:
        return self.get_buffer("kernel")

    def images(self, fields: Tensor) -> Tensor:
        power = [fields[:, :, group].square().sum(2) for group in self._groups]
        images = torch.stack([fields[:, :, 0], *power] if self.stacked else power, 2)
        return images.flatten(1, 2)


def _harmonics(m: int, offsets: Array, r: Array) -> list[Array]:
    """cos and sin of m theta; in space the real spherical harmonics of degree m, summing to 1 in squares."""
    if len(offsets) == 2:
        theta = np.arctan2(offsets[0], offsets[1])
        if m == 0:
            return [np.ones_like(r)]
        return [(r > 0) * np.cos(m * theta), (r > 0) * np.sin(m * theta)]  # no angle at the atom itself
    x, y, z = offsets / np.maximum(r, 1e-12)
    if m == 0:
        return [np.ones_like(r)]
    if m == 1:
        return [x, y, z]
    if m == 2:
        s = math.sqrt(3.0)
        return [s * x * y, s * y * z, s * z * x, s / 2 * (x * x - y * y), (3 * z * z - (r > 0)) / 2]
    a, b, c = math.sqrt(5 / 8), math.sqrt(15.0), math.sqrt(3 / 8)
    return [
        a * y * (3 * x * x - y * y), b * x * y * z, c * y * (5 * z * z - 1), z * (5 * z * z - 3) / 2,
        c * x * (5 * z * z - 1), b / 2 * z * (x * x - y * y), a * x * (x * x - 3 * y * y),
    ]  # fmt: skip


# ---- the network -----------------------------------------------------------------------------------------------


class QNetwork(torch.nn.Module):
    """representation -> conv -> leaky ReLU -> conv -> leaky ReLU -> conv -> leaky ReLU -> conv -> tanh, each with a bias.

    Parameters
    ----------
    representation : Representation, which also says how many species and dimensions there are
    kernel : odd edge of the convolution kernels, in points of the (dilated) lattice
    dilation : one for all layers, or one per layer
    hidden : channels between the layers
    initial : "he" (normal, variance 2 / inputs) or "uniform" (within 1 / sqrt(inputs)); biases: 0, or likewise uniform
    seed : int
    """

    def __init__(
        self, representation: Representation, *, kernel: int = 15, dilation: int | Sequence[int] = 1, hidden: int = 10,
        slope: float = 0.01, initial: str = "he", seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        dilations = (dilation,) * LAYERS if isinstance(dilation, int) else tuple(int(d) for d in dilation)
        if kernel < 1 or kernel % 2 == 0 or hidden < 1 or len(dilations) != LAYERS or min(dilations) < 1:
            raise ConfigurationError(
                f"a Q-network needs an odd kernel, hidden >= 1 and one dilation >= 1 or {LAYERS} of them, got kernel "
                f"{kernel}, hidden {hidden}, dilation {dilation}"
            )
        self.representation = representation
        self.species, self.dimension = representation.species, representation.dimension
        self.kernel, self.dilations, self.hidden, self.slope = int(kernel), dilations, int(hidden), float(slope)
        sizes = [representation.channels, hidden, hidden, hidden, self.species]
        window = (kernel,) * self.dimension
        self.weights = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.zeros(b, a, *window)) for a, b in itertools.pairwise(sizes)]
        )
        self.biases = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(b)) for b in sizes[1:]])
        self._grid: tuple[tuple[int, ...], tuple[bool, ...]] | None = None
        self.initialise(initial, seed=seed)

    @classmethod
    def preset(
        cls, name: str, representation: Representation | None = None, *, species: int = 1, **options: Any
    ) -> QNetwork:
        """A network of PRESETS; without a representation: Gaussian(species). Further options as for QNetwork."""
        if name not in PRESETS:
            raise ConfigurationError(
                f"no preset is called '{name}'; there are {', '.join(PRESETS)}.{nearest(name, PRESETS)}"
            )
        sizes = dict(PRESETS[name])
        dimension = sizes.pop("dimension")
        if representation is None:
            representation = Gaussian(species, dimension)
        if representation.dimension != dimension:
            raise ConfigurationError(
                f"preset '{name}' has {dimension} dimensions, but the representation has {representation.dimension}"
            )
        return cls(representation, **{**sizes, **options})

    @torch.no_grad()
    def initialise(self, kind: str = "he", *, seed: int = 0) -> None:
        """New weights of the convolutions, the same for the same seed."""
        if kind not in ("he", "uniform"):
            raise ConfigurationError(
                f"initial must be 'he' or 'uniform', got '{kind}'.{nearest(kind, ('he', 'uniform'))}"
            )
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rng = Key.of(seed).fold("network", layer).rng()
            inputs = weight[0].numel()
            if kind == "he":
                drawn, offset = rng.normal(0, math.sqrt(2 / inputs), weight.shape), np.zeros(bias.shape)
            else:
                limit = 1 / math.sqrt(inputs)
                drawn, offset = rng.uniform(-limit, limit, weight.shape), rng.uniform(-limit, limit, bias.shape)
            weight.copy_(torch.from_numpy(drawn))
            bias.copy_(torch.from_numpy(offset))

    @property
    def convolution_weights(self) -> int:
        """Number of weights of the convolutions, biases included."""
        return sum(p.numel() for p in (*self.weights, *self.biases))

    @property
    def receptive_radius(self) -> int:
        """How far, in voxels along one direction, the images reach that one Q depends on; atoms count within the
        representation's own half extent further out (thesis (2.10), (6.1))."""
        return sum(self.kernel // 2 * d for d in self.dilations)

    def on(self, grid_shape: Sequence[int], periodic: Sequence[bool]) -> QNetwork:
        """Says on which grid states live; the weights fit any. Returns itself."""
        shape, wraps = tuple(int(n) for n in grid_shape), tuple(bool(p) for p in periodic)
        if len(shape) != self.dimension or len(wraps) != self.dimension or min(shape) < 1:
            raise ConfigurationError(
                f"grid_shape and periodic must have {self.dimension} entries each, voxels >= 1, got {shape} and {wraps}"
            )
        self._grid = shape, wraps
        return self

    @property
    def grid_shape(self) -> tuple[int, ...]:
        return self._need_grid()[0]

    @property
    def periodic(self) -> tuple[bool, ...]:
        return self._need_grid()[1]

    def _need_grid(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        if self._grid is None:
            raise ConfigurationError(
                "the network does not know its grid yet; call network.on(grid_shape, periodic) first"
            )
        return self._grid

    # -- whole grids

    def forward(self, one_hot: Tensor) -> Tensor:
        """(n, species, *grid) -> Q (n, species, *grid)."""
        _, periodic = self._need_grid()
        x = self.representation(one_hot, periodic)
        convolve = functional.conv2d if self.dimension == 2 else functional.conv3d
        for layer in range(LAYERS):
            reach = self.kernel // 2 * self.dilations[layer]
            for axis, (n, wraps) in enumerate(zip(x.shape[2:], periodic, strict=True), start=2):
                if wraps:  # by index: the reach may exceed the grid
                    x = x.index_select(axis, torch.arange(-reach, n + reach) % n)
            padding = [0 if wraps else reach for wraps in periodic]
            x = convolve(x, self.weights[layer], self.biases[layer], padding=padding, dilation=self.dilations[layer])
            x = functional.leaky_relu(x, self.slope) if layer < LAYERS - 1 else _tanh(x)
        return x

    def one_hot(self, placed: Array, offsets: Array) -> Tensor:
        """(n, species, *grid) of n states: how many atoms of a species each voxel holds (in a template several)."""
        shape, _ = self._need_grid()
        placed, offsets = self._states(placed, offsets)
        images = self.weights[0].new_zeros(len(offsets) - 1, self.species, math.prod(shape))
        state = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        where = torch.from_numpy(state), torch.from_numpy(placed[:, 0]), torch.from_numpy(placed[:, 1])
        images.index_put_(where, images.new_ones(len(placed)), accumulate=True)
        return images.view(len(offsets) - 1, self.species, *shape)

    @torch.no_grad()
    def q_map(self, placed: Array) -> Array:
        """Q of every action in one state: (species, *grid) float32."""
        return self.forward(self.one_hot(placed, np.array([0, len(placed)])))[0].float().numpy()

    # -- patches

    def _states(self, placed: Array, offsets: Array) -> tuple[Array, Array]:
        shape, _ = self._need_grid()
        placed, offsets = np.asarray(placed), np.asarray(offsets, np.int64)
        if placed.ndim != 2 or placed.shape[1] != 2 or not np.issubdtype(placed.dtype, np.integer):
            raise ConfigurationError(f"placed must be whole numbers (m, 2), got {placed.dtype} {placed.shape}")
        rising = offsets.ndim == 1 and len(offsets) > 0 and offsets[0] == 0 and np.all(np.diff(offsets) >= 0)
        if not rising or offsets[-1] != len(placed):
            raise ConfigurationError(
                f"offsets must rise from 0 to the {len(placed)} rows of placed, one more than there are states"
            )
        self._check_rows("placed", placed, math.prod(shape))
        return placed.astype(np.int64), offsets

    def _check_rows(self, name: str, rows: Array, voxels: int) -> None:
        if len(rows) and (rows.min() < 0 or rows[:, 0].max() >= self.species or rows[:, 1].max() >= voxels):
            raise ConfigurationError(
                f"{name} must hold species 0 to {self.species - 1} and voxels 0 to {voxels - 1}, but a row lies outside"
            )

    def _pairs(self, placed: Array, offsets: Array, actions: Array) -> tuple[Array, Array, Array]:
        placed, offsets = self._states(placed, offsets)
        actions = np.asarray(actions)
        if actions.shape != (len(offsets) - 1, 2) or not np.issubdtype(actions.dtype, np.integer):
            raise ConfigurationError(
                f"actions must be whole numbers ({len(offsets) - 1}, 2), one row per state, "
                f"got {actions.dtype} {actions.shape}"
            )
        self._check_rows("actions", actions, math.prod(self.grid_shape))
        return placed, offsets, actions.astype(np.int64)

    def fields(self, placed: Array, offsets: Array) -> Tensor:
        """(n, species, fields, *grid) of the representation, atom by atom: cheaper than a convolution of images that
        are zero almost everywhere."""
        shape, periodic = self._need_grid()
        placed, offsets = self._states(placed, offsets)
        kernels = self.representation.kernels()
        window = kernels.shape[2:]
        reach = _offsets_of(window)  # (points, dimension)
        where = np.stack(np.unravel_index(placed[:, 1], shape), -1)[:, None, :] + reach
        inside = np.ones(where.shape[:2], bool)
        flat = np.zeros(where.shape[:2], np.int64)
        for axis, (n, wraps) in enumerate(zip(shape, periodic, strict=True)):
            along = where[..., axis]
            if wraps:
                along = along % n
            else:
                inside &= (along >= 0) & (along < n)
            flat = flat * n + along
        n_states, voxels = len(offsets) - 1, math.prod(shape)
        state = np.repeat(np.arange(n_states), np.diff(offsets))
        row = (state * self.species + placed[:, 0]) * voxels
        atom, point = np.nonzero(inside)
        target = torch.from_numpy(row[atom] + flat[atom, point])
        flat_kernels = kernels.flatten(2).transpose(1, 2)  # (species, points, fields)
        values = flat_kernels[torch.from_numpy(placed[atom, 0]), torch.from_numpy(point)]
        fields = kernels.new_zeros(n_states * self.species * voxels, kernels.shape[1]).index_add(0, target, values)
        return fields.view(n_states, self.species, *shape, -1).movedim(-1, 2)

    def update_statistics(self, placed: Array, offsets: Array) -> None:
        """A normalised representation takes note of (up to 16 of) these states, as before each training step."""
        if not self.representation.needs_statistics:
            return
        placed, offsets = self._states(placed, offsets)
        n = len(offsets) - 1
        chosen = np.unique(np.linspace(0, n - 1, min(n, STATISTICS_STATES)).astype(int)) if n else np.zeros(0, int)
        if not len(chosen):
            return
        rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
        start = np.concatenate([[0], np.cumsum(np.diff(offsets)[chosen])])
        representation, (shape, periodic) = self.representation, self._need_grid()
        if not representation.linear:
            with torch.no_grad():
                images = representation.images(self.fields(placed[rows], start)).transpose(0, 1).flatten(1).double()
            representation.see(images.mean(1).numpy(), images.var(1, correction=0).numpy())
            return
        kernels = representation.kernels()[:, 0].detach().float().numpy()
        representation.see(
            *_core.image_statistics(list(shape), list(periodic), kernels, placed[rows].astype(np.int32), start)
        )

    def q_of(self, placed: Array, offsets: Array, actions: Array, *, fft: bool | None = None) -> Tensor:
        """Q (n,) of n state-action pairs by patches around the actions, with a graph for gradients.

        fft : multiply spectra instead of convolving; None: where that is faster (large kernels in the plane, one dilation).
        """
        shape, periodic = self._need_grid()
        placed, offsets, actions = self._pairs(placed, offsets, actions)
        count = len(actions)
        if count == 0:
            return self.weights[0].new_zeros(0)
        # pitch[l]: spacing of the lattice of points of layer l's output that reach the action; extent[l]: half, in voxels
        pitch = [math.gcd(*self.dilations[layer:]) for layer in range(LAYERS)]
        extent = [self.kernel // 2 * sum(self.dilations[layer:]) for layer in range(LAYERS)]
        unit = all(d == pitch[layer] == pitch[0] for layer, d in enumerate(self.dilations))
        if fft is None:
            fft = unit and self.dimension == 2 and self.kernel >= 7
        elif fft and not unit:
            raise ConfigurationError("fft=True needs the same dilation in all layers")
        centre = np.stack(np.unravel_index(actions[:, 1], shape), -1)
        index, mask = [], []
        for layer in range(LAYERS):
            steps = np.arange(-extent[layer], extent[layer] + 1, pitch[layer])
            points = centre[:, :, None] + steps  # (n, dimension, points)
            inside = np.ones((count,) + (1,) * self.dimension, bool)
            flat = np.zeros((count,) + (1,) * self.dimension, np.int64)
            for axis, (n, wraps) in enumerate(zip(shape, periodic, strict=True)):
                view = [count] + [1] * self.dimension
                view[axis + 1] = len(steps)
                along = points[:, axis].reshape(view)
                if not wraps:
                    inside = inside & (along >= 0) & (along < n)
                flat = flat * n + (along % n if wraps else np.clip(along, 0, n - 1))
            index.append(flat)
            mask.append(None if inside.all() else _tensor(inside, self.weights[0]).unsqueeze(1))
        fields = self.fields(placed, offsets).flatten(3)
        lattice = torch.from_numpy(index[0].reshape(count, 1, 1, -1))
        gathered = fields.gather(3, lattice.expand(-1, *fields.shape[1:3], -1))
        x = self.representation.finish(gathered).view(count, -1, *index[0].shape[1:])
        if mask[0] is not None:
            x = x * mask[0]
        convolve = functional.conv2d if self.dimension == 2 else functional.conv3d
        layout = torch.channels_last if self.dimension == 2 else torch.channels_last_3d  # PyTorch's faster one
        for layer in range(LAYERS - 1):
            if fft:
                x = _correlate(x, self.weights[layer]) + self.biases[layer].view(1, -1, *[1] * self.dimension)
            else:
                dilation, stride = self.dilations[layer] // pitch[layer], pitch[layer + 1] // pitch[layer]
                weight = self.weights[layer].contiguous(memory_format=layout)
                x = x.contiguous(memory_format=layout)
                x = convolve(x, weight, self.biases[layer], stride=stride, dilation=dilation)
            x = functional.leaky_relu(x, self.slope)
            inside_next = mask[layer + 1]
            if inside_next is not None:
                x = x * inside_next
        every = x.flatten(1) @ self.weights[-1].flatten(1).T + self.biases[-1]
        return _tanh(every.gather(1, torch.from_numpy(actions[:, :1])))[:, 0]


class _Tanh(torch.autograd.Function):
    """tanh whose derivative is at least LEAST_SLOPE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        q = torch.tanh(x)
        ctx.save_for_backward(q)
        return q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (q,) = ctx.saved_tensors
        return gradients[0] * (1 - q * q).clamp(min=LEAST_SLOPE)


def _tanh(x: Tensor) -> Tensor:
    return _Tanh.apply(x)


def _offsets_of(window: Sequence[int]) -> Array:
    """(points, dimension) voxel offsets of a window, C order."""
    axes = np.meshgrid(*[np.arange(w) - w // 2 for w in window], indexing="ij")
    return np.stack(axes, -1).reshape(-1, len(window))


def _smooth(n: int) -> int:
    """The smallest product of 2, 3 and 5 that is at least n."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    """Valid cross-correlation (n, a, *points) with (b, a, *window) by spectra."""
    dimension = x.dim() - 2
    axes = tuple(range(-dimension, 0))
    size = [_smooth(n) for n in x.shape[2:]]
    a = torch.fft.rfftn(x, s=size, dim=axes)
    w = torch.fft.rfftn(weight, s=size, dim=axes).conj()
    product = torch.matmul(a.flatten(2).permute(2, 0, 1), w.flatten(2).permute(2, 1, 0))
    spectrum = product.permute(1, 2, 0).reshape(*product.shape[1:], *a.shape[2:])
    out = torch.fft.irfftn(spectrum, s=size, dim=axes)
    return out[(..., *[slice(n - w + 1) for n, w in zip(x.shape[2:], weight.shape[2:], strict=True)])]


def _not_for_the_core(network: QNetwork) -> str:
    """Why the compiled step cannot train it, or an empty string."""
    if not network.representation.linear:
        return "a representation that is not linear"
    if network.hidden != 10:
        return f"{network.hidden} hidden channels (10 are compiled)"
    if len(set(network.dilations)) > 1:
        return "a dilation per layer"
    if network.species > 16 or network.kernel > 63 or network.dilations[0] > 64:
        return "more than 16 species, kernels beyond 63 or dilations beyond 64"
    return ""


# ---- training --------------------------------------------------------------------------------------------------


class Trainer:
    """Mean square loss, Adam (Kingma, Ba, arXiv 1412.6980), on state-action pairs; the same bits for the same input.

    Parameters
    ----------
    network : QNetwork; its parameters become views of one array that the trainer owns
    grid_shape, periodic : voxels and boundary conditions per direction
    lr : learning rate
    l1 : weight of the representation's sum of absolute coefficients in the loss; None: what the representation says
    backend : "core": compiled; "torch": portable; "auto": compiled where it can be
    steps : optimiser steps per `step`
    threads : of the compiled backend; 0: all cores. Results do not depend on it.

    Raises ConfigurationError for a grid or arrays that do not fit.
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(
        self, network: QNetwork, grid_shape: Sequence[int], periodic: Sequence[bool], *, lr: float = 1e-3,
        l1: float | None = None, backend: str = "auto", steps: int = 1, threads: int = 1,
    ):  # fmt: skip
        if backend not in ("auto", "core", "torch"):
            raise ConfigurationError(
                f"backend must be auto, core or torch, got '{backend}'.{nearest(backend, ('auto', 'core', 'torch'))}"
            )
        if lr <= 0 or steps < 1:
            raise ConfigurationError(f"lr must be above 0 and steps at least 1, got {lr} and {steps}")
        self.network = network.on(grid_shape, periodic)
        self.lr, self.steps, self.threads = float(lr), int(steps), int(threads)
        self.l1 = float(getattr(network.representation, "l1", 0.0)) if l1 is None else float(l1)
        self.updates = 0
        named = dict(network.named_parameters())
        # the convolutions first, layer by layer: the order of the compiled step
        order = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("weights", "biases")]
        order += [name for name in named if name not in order]
        self._names, self._shapes = order, [tuple(named[name].shape) for name in order]
        self.parameters = np.concatenate([named[name].detach().numpy().ravel() for name in order]).astype(np.float32)
        self._first, self._second = np.zeros_like(self.parameters), np.zeros_like(self.parameters)
        start = 0
        for name in order:
            parameter = named[name]
            stop = start + parameter.numel()
            parameter.data = torch.from_numpy(self.parameters[start:stop]).view(parameter.shape)
            start = stop
        self._parameters = [named[name] for name in order]
        self._convolutions = network.convolution_weights
        reason = _not_for_the_core(network)
        if backend == "core" and reason:
            raise ConfigurationError(f"backend='core' trains no network with {reason}; take 'auto' or 'torch'")
        self.backend = "torch" if reason or backend == "torch" else "core"
        self._core: _core.QTraining | None = None
        if self.backend == "core":
            self._core = _core.QTraining(
                list(self.grid_shape), list(self.periodic), species=network.species, kernel=network.kernel,
                dilation=network.dilations[0], half_window=network.representation.kernels().shape[-1] // 2,
                slope=network.slope,
            )  # fmt: skip

    @property
    def grid_shape(self) -> tuple[int, ...]:
        return self.network.grid_shape

    @property
    def periodic(self) -> tuple[bool, ...]:
        return self.network.periodic

    def q_of(self, placed: Array, offsets: Array, actions: Array) -> Array:
        """Q (n,) float32 of n state-action pairs."""
        if self._core is not None:
            placed, offsets, actions = self.network._pairs(placed, offsets, actions)
            with torch.no_grad():
                kernels, shift = self.network.representation.effective()
            return self._core.evaluate(
                self.parameters[: self._convolutions], kernels.numpy().ravel(), shift.numpy(),
                placed.astype(np.int32), offsets, actions.astype(np.int32), threads=self.threads,
            )  # fmt: skip
        with torch.no_grad():
            return self.network.q_of(placed, offsets, actions).numpy()

    def q_map(self, placed: Array) -> Array:
        """Q of every action in one state: (species, *grid) float32."""
        return self.network.q_map(placed)

    def gradient(self, placed: Array, offsets: Array, actions: Array, targets: Array) -> tuple[float, Array, Array]:
        """Loss with its penalty, Q (n,), and the derivative of the loss with respect to `parameters`."""
        placed, offsets, actions = self.network._pairs(placed, offsets, actions)
        targets = np.asarray(targets, np.float32)
        if targets.shape != (len(offsets) - 1,) or not np.all(np.isfinite(targets)) or not len(targets):
            raise ConfigurationError(
                f"targets must be finite numbers ({max(len(offsets) - 1, 1)},), one per state and at least one, "
                f"got shape {targets.shape}"
            )
        if self._core is not None:
            return self._core_gradient(placed, offsets, actions, targets)
        q = self.network.q_of(placed, offsets, actions)
        loss = functional.mse_loss(q, torch.from_numpy(targets).to(q))
        coefficients = self.network.representation.size_of_coefficients() if self.l1 else None
        if coefficients is not None:
            loss = loss + self.l1 * coefficients
        gradients = torch.autograd.grad(loss, self._parameters)
        flat = np.concatenate([g.numpy().ravel() for g in gradients])
        return float(loss.detach()), q.detach().numpy().astype(np.float32), flat

    def _core_gradient(
        self, placed: Array, offsets: Array, actions: Array, targets: Array
    ) -> tuple[float, Array, Array]:
        """The compiled step knows a representation by its kernels and shift; torch takes the derivative on from there."""
        assert self._core is not None
        representation, own = self.network.representation, self._parameters[2 * LAYERS :]
        kernels, shift = representation.effective()
        loss, q, gradient, by_kernels, by_shift = self._core.gradient(
            self.parameters[: self._convolutions], kernels.detach().numpy().ravel(), shift.detach().numpy(),
            placed.astype(np.int32), offsets, actions.astype(np.int32), targets, image=bool(own), threads=self.threads,
        )  # fmt: skip
        if not own:
            return loss, q, gradient
        pulled = [torch.from_numpy(by_kernels).view(kernels.shape), torch.from_numpy(by_shift)]
        outputs = [kernels, shift]
        coefficients = representation.size_of_coefficients() if self.l1 else None
        if coefficients is not None:
            loss += self.l1 * float(coefficients.detach())
            outputs.append(coefficients)
            pulled.append(torch.tensor(self.l1))
        used = [k for k, out in enumerate(outputs) if out.requires_grad]
        more = torch.autograd.grad([outputs[k] for k in used], own, [pulled[k] for k in used])
        return loss, q, np.concatenate([gradient, *[g.numpy().ravel() for g in more]])

    def step(self, placed: Array, offsets: Array, actions: Array, targets: Array) -> tuple[float, Array]:
        """`steps` updates of the weights; the loss and Q (n,) that the last of them started from."""
        loss, q = 0.0, np.zeros(0, np.float32)
        for _ in range(self.steps):
            self.network.update_statistics(placed, offsets)
            loss, q, gradient = self.gradient(placed, offsets, actions, targets)
            self._adam(gradient)
        return loss, q

    def _adam(self, gradient: Array) -> None:
        self.updates += 1
        _core.adam_step(
            gradient, self.parameters, self._first, self._second, update=self.updates, rate=self.lr, beta1=self.beta1,
            beta2=self.beta2, epsilon=self.epsilon,
        )  # fmt: skip

    def weights(self) -> dict[str, Array]:
        """What evaluates the network elsewhere, float32, copies: w1 .. w4 (out, in, *kernel), b1 .. b4 (out,); for a
        linear representation also kernels (species, *window) and shift (species,): image = kernels * atoms + shift."""
        network = self.network
        arrays = {}
        for layer in range(LAYERS):
            arrays[f"w{layer + 1}"] = network.weights[layer].detach().numpy().copy()
            arrays[f"b{layer + 1}"] = network.biases[layer].detach().numpy().copy()
        if network.representation.linear:
            with torch.no_grad():
                kernels, shift = network.representation.effective()
            arrays["kernels"], arrays["shift"] = kernels.numpy().copy(), shift.numpy().copy()
        return arrays

    def state_dict(self) -> dict[str, Array]:
        """Everything that training goes on from, as plain arrays (np.savez, no pickles)."""
        buffers = {name: b for name, b in self.network.named_buffers() if name in self.network.state_dict()}
        return {
            "layout": np.array(
                [f"{n} {' '.join(map(str, s))}" for n, s in zip(self._names, self._shapes, strict=True)]
            ),
            "parameters": self.parameters.copy(),
            "first_moment": self._first.copy(),
            "second_moment": self._second.copy(),
            "updates": np.array(self.updates, np.int64),
            **{f"buffer.{name}": buffer.numpy().copy() for name, buffer in buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Goes on from a state_dict() of a network of the same shapes."""
        mine = self.state_dict()
        if set(state) != set(mine) or [str(t) for t in state["layout"]] != [str(t) for t in mine["layout"]]:
            raise ConfigurationError(
                "this snapshot is of another network: expected the arrays "
                f"{', '.join(mine)} with the layout {'; '.join(map(str, mine['layout']))}; make the network as it was made"
            )
        for name, array in mine.items():
            if name != "layout" and np.shape(state[name]) != array.shape:
                raise ConfigurationError(
                    f"snapshot array '{name}' must have shape {array.shape}, got {np.shape(state[name])}"
                )
        self.parameters[:] = state["parameters"]
        self._first[:] = state["first_moment"]
        self._second[:] = state["second_moment"]
        self.updates = int(state["updates"])
        for name, buffer in self.network.named_buffers():
            if f"buffer.{name}" in state:
                buffer.copy_(torch.from_numpy(np.array(state[f"buffer.{name}"])))
