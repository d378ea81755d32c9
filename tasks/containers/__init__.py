"""The structure of audio and picture files, as far as the libraries that decode them do not judge it."""
