"""Linear layers with adapters: plain, LoRA, DoRA and 8-bit."""
