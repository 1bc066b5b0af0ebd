"""Fine-tuning: LoRA trained on the resident base, in slices that leave room for serving.

Reads bottom up: recipe and rows (no torch) -> samples and batches -> lora, attention, layerwise -> trainer -> run.
"""
