"""The only door between checkpoints and everybody else: exports in timm's layout, and loading that cannot go wrong quietly."""

from selfsight.weights.export import export_encoder
from selfsight.weights.pretrained import PretrainedEncoder, load_pretrained
from selfsight.weights.run import export_run, newest_export

__all__ = ["PretrainedEncoder", "export_encoder", "export_run", "load_pretrained", "newest_export"]
