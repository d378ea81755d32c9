"""An experiment file → typed sections → the plan of its trials."""
