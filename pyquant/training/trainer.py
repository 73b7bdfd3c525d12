"""TRL's SFTTrainer, with a loss that costs what its target tokens cost on a CPU too, and learning-rate groups."""

import torch
from trl import SFTTrainer

from .methods import split_learning_rates

__all__ = ["CompletionTrainer"]


class CompletionTrainer(SFTTrainer):
    """SFTTrainer whose loss on a CPU projects only the target positions to the vocabulary.

    TRL does so on a GPU; on a CPU it projects every position, prompt and padding included. Where the completion is two
    tokens of eighty, that is half of the step.

    Args:
        embedding_learning_rate: that of embeddings and output layer; None: that of the rest.
    """

    def __init__(self, *args, embedding_learning_rate: float | None = None, **kwargs):
        self._embedding_learning_rate = embedding_learning_rate
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self._embedding_learning_rate is not None:
            split_learning_rates(self.model if model is None else model, optimizer, self._embedding_learning_rate)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.accelerator.device.type != "cpu" or self.accelerator.num_processes > 1 or self.args.loss_type != "nll":
            self._gather_head(model)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        targets = labels != -100
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        # Past the wrapped forward, Trainer's own autocast does not reach.
        with self.accelerator.autocast():
            features = {name: value for name, value in inputs.items() if name != "labels"}
            hidden = base.base_model(**features, use_cache=False).last_hidden_state[:, :-1]
            logits = base.get_output_embeddings()(hidden[targets])
        total = torch.nn.functional.cross_entropy(logits.float(), labels[targets], reduction="sum")
        loss = total / (targets.sum() if num_items_in_batch is None else num_items_in_batch)
        right = (logits.detach().argmax(-1) == labels[targets]).float().mean().item()
        self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(right)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _gather_head(self, model: torch.nn.Module) -> None:
        """Let FSDP2 gather the output layer; the backward pass shards it again.

        FSDP2 does so for layers that are called, but TRL's loss takes this one's weight without a call. It gathers a
        shard by itself: an offloaded one on the CPU, and a trained one without the gradients of the other processes.
        """
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()
