"""The offline stage: a Hugging Face checkpoint in, a smaller one with a quality report out."""
