"""The only door between checkpoints and everybody else: exports in timm's layout, loading that cannot half succeed."""

from selfsight.weights.checkpoint import export_run
from selfsight.weights.export import export_encoder
from selfsight.weights.pretrained import PretrainedEncoder, load_pretrained
from selfsight.weights.run import newest_export

__all__ = ["PretrainedEncoder", "export_encoder", "export_run", "load_pretrained", "newest_export"]
