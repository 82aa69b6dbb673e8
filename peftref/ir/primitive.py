"""What every primitive states: tensors, shapes, cost, algebra, and its torch forms.

A primitive is the smallest building block of a function. It is made of its arguments (from
YAML) and its ``Place`` (widths known after shape inference), and knows no technique. torch is
imported only inside ``bind`` and ``bind_matrix``, so that checking needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Protocol, TypeVar

from peftref.spec.base import Frozen

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FROM_BACKBONE",
    "IDENTITY",
    "Algebra",
    "Arguments",
    "Link",
    "Operation",
    "Place",
    "Primitive",
    "Runtime",
    "TensorSpec",
]

Operation = Callable[..., "Tensor"]


class Arguments(Frozen):
    """Arguments common to all primitives; ``name`` names its tensors."""

    name: str | None = None


FROM_BACKBONE = (
    "vocabulary", "weight_norm", "input_norm", "svd_left", "svd_right", "svd_up", "svd_down",
    "svd_scaled_right", "qr_up", "qr_down", "loftq_up", "loftq_down",
)
"""Initialisers that read the backbone's tensor."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an adapter, known from shapes alone.

    Attributes:
        name: path inside the module, such as ``down.weight``.
        shape: its shape.
        init: initialiser text, such as ``zeros`` or ``normal(0.02)``.
        trainable: whether an optimiser may change it.
        seed: own seed of a frozen random tensor; None: the adapter's seed.
        share: name of the tensor that all sites of the module use together; None: one a site. A
            name that begins with ``@`` is shared by all modules of the technique.
        sliced: a shared tensor may be larger than a site needs; the leading corner is used.
        buffer: state that is saved but is no parameter (a mask).
        stacked: leading copies made by a coupling; initialised apart.
        selects: scores that open or close entries of another tensor; couplings leave them alone.
        rate: learning rate, over that of its member.
        start_of: name of the tensor whose first values this one keeps.
    """

    name: str
    shape: tuple[int, ...]
    init: str
    trainable: bool = True
    seed: int | None = None
    share: str | None = None
    sliced: bool = False
    buffer: bool = False
    stacked: int = 0
    selects: bool = False
    rate: float = 1.0
    start_of: str | None = None

    @property
    def from_backbone(self) -> bool:
        """Whether it starts at values of the backbone's own tensor at its site."""
        return self.init.partition("(")[0] in FROM_BACKBONE

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total


@dataclass(frozen=True, slots=True)
class Place:
    """What a primitive knows of where it stands.

    Attributes:
        d_in: width of the tensor that reaches it (0: none).
        d_out: width of the port that the whole function writes.
        hidden_size: width of the backbone's residual stream.
        port_shape: shape of the port's own tensor, for ports ``weight`` and ``bias``.
        stack: ``encoder`` or ``decoder``: whose padding mask applies.
        heads: key-value heads of the attention that it stands at (0: it is none).
        layers: layers of its stack.
    """

    d_in: int
    d_out: int
    hidden_size: int
    port_shape: tuple[int, ...] = ()
    stack: str = ""
    heads: int = 0
    layers: int = 0


@dataclass(frozen=True, slots=True)
class Algebra:
    """What holds for a map ``f``; properties of expressions are derived from these.

    Attributes:
        linear: f(a x + b y) = a f(x) + b f(y).
        affine: f(x) = f_0(x) + b with linear ``f_0`` whose matrix form it has.
        diagonal: f(x) = v * x elementwise.
        orthogonal: f keeps norms and has determinant one.
        source: f has no input (learned rows, a trained difference).
        zero_at_init: f(x) = 0 before the first step.
        identity_at_init: f(x) = x before the first step.
        keeps_zero: f(0) = 0 before the first step.
        matrix: f has a matrix form.
        base: f maps the frozen weight alone, before every trained edit.
        stream: f has an activation form.
        random: f draws random numbers while training.
        mixes_tokens: a row of the output depends on other rows of the input.
        per_sample: f depends on the sample beyond its own row (gates).
    """

    linear: bool = False
    affine: bool = False
    diagonal: bool = False
    orthogonal: bool = False
    source: bool = False
    zero_at_init: bool = False
    identity_at_init: bool = False
    keeps_zero: bool = False
    matrix: bool = False
    base: bool = False
    stream: bool = True
    random: bool = False
    mixes_tokens: bool = False
    per_sample: bool = False

    def then(self, after: Algebra) -> Algebra:
        """What holds for ``x -> after(self(x))``."""
        return Algebra(
            linear=self.linear and after.linear,
            affine=(self.linear or self.affine) and (after.linear or after.affine),
            diagonal=self.diagonal and after.diagonal,
            orthogonal=self.orthogonal and after.orthogonal,
            source=self.source or after.source,
            zero_at_init=after.zero_at_init or (self.zero_at_init and after.keeps_zero),
            identity_at_init=self.identity_at_init and after.identity_at_init,
            keeps_zero=after.zero_at_init or (self.keeps_zero and after.keeps_zero),
            matrix=self.matrix and after.matrix,
            base=after.base,
            stream=self.stream and after.stream,
            random=self.random or after.random,
            mixes_tokens=self.mixes_tokens or after.mixes_tokens,
            per_sample=self.per_sample or after.per_sample,
        )


IDENTITY = Algebra(
    linear=True,
    diagonal=True,
    orthogonal=True,
    identity_at_init=True,
    keeps_zero=True,
    matrix=True,
)


def identity_like(tensor: Tensor, width: int) -> Tensor:
    """The identity of a width, on the tensor's device and of its type, float32 at least."""
    wide = tensor.is_floating_point() and tensor.element_size() >= 4
    return (tensor if wide else tensor.float()).new_zeros(width, width).fill_diagonal_(1)


@dataclass(frozen=True, slots=True)
class Link:
    """What a primitive is to an op that computes several links of a chain at once.

    Attributes:
        kind: ``product`` (h W^T), ``affine`` (h W^T + b), ``dropout`` (value: its p),
            ``activation`` (value: its name), ``scale`` (v h), ``rotate`` (blocks on the diagonal,
            which ``bind_operand`` makes) or ``norm`` (rows of the weight get trained norms).
        value: the argument that the op must know.
    """

    kind: Literal["product", "affine", "dropout", "activation", "scale", "rotate", "norm"]
    value: float | str = ""


class Runtime(Protocol):
    """What a torch form may ask of the forward call that runs it."""

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        ...

    def token_mask(self, stack: str) -> Tensor | None:
        """The (batch, tokens) padding mask of the running call, where it has one."""
        ...

    def weight(self) -> Tensor:
        """The frozen weight (d_out, d_in) at the site."""
        ...

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen projections of the attention at the site make of (..., d) rows."""
        ...


A = TypeVar("A", bound=Arguments)


class Primitive(ABC, Generic[A]):
    """Base of all primitives: registered class, frozen arguments, torch-free statements.

    ``bind`` returns the activation form ``(stream, *tensors) -> stream`` (a source takes only its
    tensors); ``bind_matrix`` the matrix form ``(matrix or None, *tensors) -> matrix``, where None
    stands for the identity and matrices are (rows out, columns in).
    """

    name: ClassVar[str]
    Arguments: ClassVar[type[Arguments]] = Arguments
    on_tensors: ClassVar[bool] = False  # maps tensors to a tensor, reads no stream
    reads_weight: ClassVar[bool] = False  # asks the runtime for the frozen weight
    reads_projections: ClassVar[bool] = False  # asks for the attention's own projections
    reads_start: ClassVar[bool] = False  # reads its input twice: trained, and as it was at first

    def __init__(self, arguments: A, place: Place) -> None:
        self.arguments = arguments
        self.place = place

    @property
    def label(self) -> str:
        """The name that its tensors carry."""
        return self.arguments.name or self.name

    @property
    def width(self) -> int:
        """Width of the output; the same as the input's unless overridden."""
        return self.place.d_in

    @property
    def kept(self) -> int:
        """Elements a token of what its backward pass needs beside what it reads."""
        return self.width

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors it needs, in the order that the torch forms take them."""
        return ()

    @abstractmethod
    def algebra(self) -> Algebra:
        """What holds for it."""

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        """What holds for it after what its stream inputs have gone through."""
        return inputs[0].then(self.algebra()) if inputs else self.algebra()

    def flops(self) -> int:
        """Multiply-adds times two of the activation form, per token, forward."""
        return 0

    def matrix_flops(self) -> int:
        """Multiply-adds times two of the matrix form, once per step."""
        return 0

    @property
    def link(self) -> Link | None:
        """What an op may take it for; None: it runs by itself."""
        return None

    @property
    def is_product(self) -> bool:
        """Whether it is ``h W^T`` of its two inputs and nothing else."""
        return self.link is not None and self.link.kind == "product"

    @abstractmethod
    def bind(self, runtime: Runtime) -> Operation:
        """Return the activation form."""

    def bind_operand(self) -> Operation:
        """Return what makes of its tensors the one that the op of its link takes."""
        raise NotImplementedError(f"{self.name} is no link that an op takes apart")

    def bind_matrix(self, runtime: Runtime) -> Operation:
        """Return the matrix form; only called where ``algebra().matrix`` holds.

        By default the activation form of the columns, as is right for any linear map.
        """
        form, d_in = self.bind(runtime), self.place.d_in

        def matrix(before: Tensor | None, *tensors: Tensor) -> Tensor:
            if before is None:
                before = identity_like(tensors[0] if tensors else runtime.weight(), d_in)
            return form(before.mT, *tensors).mT

        return matrix
