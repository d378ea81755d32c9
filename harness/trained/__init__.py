"""What a trial has trained, as a folder of its own that can be used without the run: exported, loaded, asked."""
