"""Audio, picture and text files as such: what their structure says, before they are decoded and whatever they mean."""
