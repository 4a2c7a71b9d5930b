"""AdamW over all parameters in two fused passes, with decay groups and its state as named tensors.

Decayed: every matrix, the token and position embeddings included, as GPT-2, Llama and OLMo do (a tied embedding is also the output matrix).
Not decayed: vectors, that is biases and norm weights, whose scale the decay would only fight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from cllm.runtime.errors import CheckpointError, UserError


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) on float32 master weights.

    named_parameters: (name, parameter) pairs. Moments are float32, gradients float32 or bfloat16.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise UserError("the model has no trainable parameters. Set requires_grad on what should be trained.")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.decays = {name: weight_decay if parameter.dim() >= 2 else 0.0 for name, parameter in self.parameters.items()}
        self.exp_avg = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in self.parameters.items()}
        self.num_updates = 0

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, learning_rate: float, max_norm: float = 0.0) -> tuple[float, float, int]:
        """Clips to `max_norm` (0: not at all) and updates in place; returns (gradient norm before clipping, largest |g|, non-finite count).

        When any gradient is not finite, nothing changes and the update is not counted.
        """
        from cllm import kernels

        # A parameter that took no part in the loss is skipped, as torch's own optimizers do: it is not decayed either.
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        grads = [gradient for name in names if (gradient := self.parameters[name].grad) is not None]
        stats = kernels.adamw_(
            [self.parameters[name].detach() for name in names],
            grads,
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            learning_rate=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decays=[self.decays[name] for name in names],
            step=self.num_updates + 1,
            max_norm=max_norm,
            skip_nonfinite=True,
        )
        norm, largest, nonfinite = stats.tolist()
        if not nonfinite:
            self.num_updates += 1
        return norm, largest, int(nonfinite)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`exp_avg.NAME`, `exp_avg_sq.NAME` and the number of updates: tensors only, so that safetensors holds them all."""
        state = {f"exp_avg.{name}": tensor for name, tensor in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": tensor for name, tensor in self.exp_avg_sq.items()}
        return state | {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise CheckpointError(f"the optimizer state does not fit this model: {len(odd)} names differ, first {odd[0]}.")
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(f"optimizer state {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}.")
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self.num_updates = int(state["num_updates"])
