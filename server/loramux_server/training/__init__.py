"""Fine-tuning as jobs of a running server: files, a durable queue, one job at a time in the worker, adapters out.

Reads bottom up: records -> database -> files, folder, results -> job -> publication -> runner -> manager.
"""
