"""Encoders: the built-in ones and those of Hugging Face."""
