"""The corpus on disk: plain USTAR shards, index, chunk table, manifest. Bytes, offsets and checksums; no torch."""

from selfsight.shards.corpus import Corpus, Sample
from selfsight.shards.decode import DecodeError, decode_image, decode_pixels
from selfsight.shards.manifest import Manifest
from selfsight.shards.remote import Unreachable
from selfsight.shards.tar import DamagedTar

__all__ = ["Corpus", "DamagedTar", "DecodeError", "Manifest", "Sample", "Unreachable", "decode_image", "decode_pixels"]
