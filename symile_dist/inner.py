"""The second optimizer: it trains the objective's inner modules, of which DeepSpeed knows nothing.

DeepSpeed has one optimizer, for everything that is a parameter of the model. Inner modules are none: the objective
holds them in a plain dict, so they are not sharded, cast or stepped by it. Every rank has all of them, in float32, and
takes the same steps: the ranks' gradients are averaged, and Adam does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symile_dist.config import InnerOptimizerConfig
from symile_dist.distributed import all_reduce_sum, world_size


class InnerOptimizer:
    """Adam on the inner modules of an objective.

    Its learning rate is constant: what the modules follow (a critic the encoders) moves to the end of the run.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: InnerOptimizerConfig) -> None:
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self.config = config
        self.adam = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, eps=config.eps)

    def step(self, loss: Tensor) -> bool:
        """Back-propagates and takes a step, or none where a gradient of any rank is not finite: then False.

        All ranks call it together. The gradients' average is the same on all of them, hence so is what they decide.
        """
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        averaged = all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients])) / world_size()
        if not torch.isfinite(averaged).all():
            return False
        parts = averaged.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.adam.step()
        self.adam.zero_grad()
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Adam's state, as `NUMBER.NAME` of each parameter."""
        return {
            f"{number}.{name}": value
            for number, parameter in enumerate(self.parameters)
            for name, value in self.adam.state.get(parameter, {}).items()
        }

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Puts what `tensors` gave in the place of Adam's state."""
        self.adam.state.clear()
        for key, value in saved.items():
            number, _, name = key.partition(".")
            parameter = self.parameters[int(number)]
            # Adam counts on the host.
            self.adam.state[parameter][name] = value.clone() if name == "step" else value.clone().to(parameter.device)
