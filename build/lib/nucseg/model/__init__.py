"""The network: MobileSAM's encoder, LoRA, the heads, base checkpoints and adapter files.

Nothing here trains, segments files or reads recorded results.
"""
