"""A training ends at the first step whose loss or gradient is not finite, before that step reaches the weights."""

from typing import Any

import torch
from transformers import Trainer

from tasft.core.errors import UserError
from tasft.models.load import is_finite

_LEARNED = 0.1  # Nats: below, a gradient that rounds to 0 is that of rows known by heart.


class FiniteSteps(Trainer):
    """A transformers `Trainer` that ends with a sentence where the loss or the gradient is no number any more.

    It also ends where no weight has a gradient though there is a loss: norms make 0 of what is too large.

    Weights stay as the step before left them, and so do the checkpoints. A gradient that is too large for fp16 alone
    ends nothing: the gradient scaler passes over that step and goes on with a smaller scale.

    Raises:
        UserError: In `train`: says at which step, what, and what to do.
    """

    _bad_losses: torch.Tensor | float = 0.0
    _loss_of_step: torch.Tensor | float = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers'; whether the loss is finite is remembered until the step is whole."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._bad_losses = self._bad_losses + (~torch.isfinite(loss)).float()
        self._loss_of_step = self._loss_of_step + loss.float()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # The last thing that happens before the optimizer's step, in all processes and at each.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad, self._bad_losses = torch.as_tensor(self._bad_losses, device=self.args.device), 0.0
        loss, self._loss_of_step = float(self._loss_of_step), 0.0
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        what = None
        if bad:
            what = "the loss"
        elif self.accelerator.scaler is None and norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            what = "the gradient"
        elif norm is not None and float(norm) == 0 and loss > _LEARNED and self.args.learning_rate:
            raise UserError(
                f"{self.args.output_dir}: no weight has a gradient at step {self.state.global_step + 1}, though the "
                f"loss is {loss:.3g}: weights are so large that the model's norms make 0 of them; {self._advice()}"
            )
        if what:
            raise UserError(
                f"{self.args.output_dir}: {what} of step {self.state.global_step + 1} is not a finite number, and "
                f"training ends before it: {self._advice()}"
            )
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; the weights at the end are looked at too."""
        output = super().train(*args, **kwargs)
        self._refuse_bad_weights()
        return output

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_bad_weights()
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_bad_weights(self) -> None:
        # A finite gradient can still lead to weights that are not, which no loss has been computed of yet.
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        bad = torch.as_tensor(float(not all(map(is_finite, trained))), device=self.args.device)
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if bad:
            raise UserError(
                f"{self.args.output_dir}: after step {self.state.global_step} weights are not finite numbers: "
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        other = ", or train in bf16, whose range is that of float32" if self.args.fp16 else ""
        return f"lower learning_rate or raise warmup_steps{other}; checkpoints that were saved before stay as they are"
