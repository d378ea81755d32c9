"""Pictures and series drawn by code, and their captions."""
