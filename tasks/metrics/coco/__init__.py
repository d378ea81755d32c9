"""The COCO caption metrics and their tokenizer."""
