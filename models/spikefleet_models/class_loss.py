"""Cross entropy of classes, with a weight for each class."""

import torch.nn.functional as F
from torch import Tensor


def class_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Compute the cross entropy, mean over the batch.

    With weights it is the mean of w_y CE over the samples. Torch's own weighted mean divides by the weights in the
    batch instead, so that it depends on how a global batch is cut into slices.

    Args:
        logits: [B, K], float32 or wider.
        targets: classes, int64 [B], or their probabilities, float32 [B, K].
        label_smoothing: as in torch's cross entropy.
        class_weights: [K], on the device of the logits.
    """
    if class_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    total = F.cross_entropy(
        logits, targets, class_weights.to(logits.dtype), label_smoothing=label_smoothing, reduction="sum"
    )
    return total / len(logits)
