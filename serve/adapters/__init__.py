"""Adapters: what a fine-tuned folder holds, the copies that are served, and who uses them."""
