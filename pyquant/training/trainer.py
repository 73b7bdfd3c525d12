"""TRL's SFTTrainer, with a loss that costs what its target tokens cost on a CPU too."""

import torch
from trl import SFTTrainer

__all__ = ["CompletionTrainer"]


class CompletionTrainer(SFTTrainer):
    """SFTTrainer whose loss on a CPU projects only the target positions to the vocabulary.

    TRL does so on a GPU; on a CPU it projects every position, prompt and padding included. Where the completion is two
    tokens of eighty, that is half of the step.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.accelerator.device.type != "cpu" or self.accelerator.num_processes > 1 or self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        targets = labels != -100
        base = self.accelerator.unwrap_model(model).get_base_model()
        # Past the wrapped forward, Trainer's own autocast does not reach.
        with self.accelerator.autocast():
            features = {name: value for name, value in inputs.items() if name != "labels"}
            hidden = base.base_model(**features, use_cache=False).last_hidden_state[:, :-1]
            logits = base.get_output_embeddings()(hidden[targets])
        total = torch.nn.functional.cross_entropy(logits.float(), labels[targets], reduction="sum")
        loss = total / (targets.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss
