"""Decoders, their parameters, and Hugging Face checkpoints of them."""
