"""State that lives beside the model and that ZeRO does not own."""
