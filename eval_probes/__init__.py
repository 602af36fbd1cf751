"""Protocols run on frozen weights: features extracted once, probes on them, scores with intervals in a store.

Sees weights and corpora, never a trainer.
"""
