"""A multi-layer perceptron for feature vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from symile_dist.types import Inputs, Padded

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class MLP(nn.Module):
    """input_dim -> hidden layers, each with an activation -> embedding_dim; without hidden layers a linear map.

    Raises ValueError for an activation other than "gelu" and "relu".
    """

    def __init__(
        self,
        embedding_dim: int,
        input_dim: int,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation = '{activation}' should be gelu or relu")
        layers: list[nn.Module] = []
        previous = input_dim
        for width in hidden:
            layers += [nn.Linear(previous, width), ACTIVATIONS[activation](), nn.Dropout(dropout)]
            previous = width
        layers.append(nn.Linear(previous, embedding_dim))
        self.layers = nn.Sequential(*layers)
        self.input_dim = input_dim

    def forward(self, inputs: Inputs) -> Tensor:
        """(n, ...), flattened to (n, input_dim) -> (n, embedding_dim).

        Raises TypeError for `Padded`, ValueError for another number of values.
        """
        if isinstance(inputs, Padded):
            raise TypeError("MLP takes feature vectors of one size (a tensor), not sequences of unequal length")
        flat = inputs.flatten(1)
        if flat.shape[1] != self.input_dim:
            raise ValueError(f"MLP: a sample has {flat.shape[1]} values, input_dim is {self.input_dim}")
        return self.layers(flat)
