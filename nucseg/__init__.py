"""nucseg: LoRA fine-tuning of MobileSAM for nuclei instance segmentation in H&E images."""

__version__ = "0.1.0"
