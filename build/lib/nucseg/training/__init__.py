"""Losses, the training loop and its checkpoints, pretraining the base and fine-tuning on your own images."""
