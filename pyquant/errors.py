"""The exceptions that pyquant raises for a caller to tell apart."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint's 4-bit weight is truncated, inconsistent or malformed. The message names the key and the remedy."""
