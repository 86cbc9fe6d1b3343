"""Adapters: checks of fine-tuned folders, the store of copies, the registry, the LoRA queue."""
