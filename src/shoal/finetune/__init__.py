"""Pretrained encoders, fine-tuned: what stands beside them, and how they leave shoal."""
