"""Everything in loramux that knows what a LoRA is: formats, storage, layers, training, export."""

__version__ = "0.1.0"
