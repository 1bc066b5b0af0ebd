"""The engine: policy without torch (sequence, scheduler, kv_cache), the device, and the process boundary."""
