"""The fused loss inside a Hugging Face causal language model."""

from .attach import CPORequest, LinearLossOutput, LogpsRequest, StatisticsRequest, attach_linear_loss

__all__ = ["CPORequest", "LinearLossOutput", "LogpsRequest", "StatisticsRequest", "attach_linear_loss"]
